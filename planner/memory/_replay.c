/* torch's caching allocator: planner/memory/pools.py, in C, for speed.
 *
 * replay(parts, cap) -> (ok, allocated, peak_allocated, reserved, peak_reserved, small, small_peak)
 *
 * parts: a sequence of (events, sizes, base, flags). events: int64, i to allocate sizes[i], ~i to
 * release it; sizes: int64 bytes; base: added to i, so that parts may share or keep apart their
 * storages; flags: RELEASE, give cached segments back after the part; RESET, reset the peaks before
 * it; CAPPED, the cap on the large pool holds in it. allocated and its peak count both pools;
 * reserved is the large pool's; small is the small pool's tensors. Optional: the Python module does
 * the same (a test compares them).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELEASE = 1, RESET = 2, CAPPED = 4 };
static const int64_t SMALL = 1 << 20, MIN_REMAINDER = 1 << 20, LARGE_BUFFER = 20 << 20, MIN_LARGE = 10 << 20,
                     ROUND_LARGE = 2 << 20;

typedef struct { int64_t size, address; int32_t prev, next; char free; } Block;
typedef struct { int64_t size, address; int32_t block; } Free;

typedef struct {
    Block *blocks; int32_t count, room;
    Free *frees; int32_t free_count, free_room;
    int32_t *held; int64_t held_room;
    int64_t next_address, allocated, peak_allocated, reserved, peak_reserved, small, small_peak;
} Pool;

static int find(const Pool *p, int64_t size, int64_t address) {
    int32_t low = 0, high = p->free_count;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        const Free *f = &p->frees[middle];
        if (f->size < size || (f->size == size && f->address < address)) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void drop(Pool *p, int32_t place) {
    memmove(p->frees + place, p->frees + place + 1, (p->free_count - place - 1) * sizeof(Free));
    p->free_count--;
}

static int keep(Pool *p, int32_t block) {
    Block *b = &p->blocks[block];
    if (p->free_count == p->free_room) {
        int32_t room = p->free_room ? 2 * p->free_room : 1024;
        Free *grown = realloc(p->frees, room * sizeof(Free));
        if (!grown) return 0;
        p->frees = grown; p->free_room = room;
    }
    int32_t place = find(p, b->size, b->address);
    memmove(p->frees + place + 1, p->frees + place, (p->free_count - place) * sizeof(Free));
    p->frees[place] = (Free){b->size, b->address, block};
    p->free_count++;
    b->free = 1;
    return 1;
}

static int32_t fresh(Pool *p, int64_t size, int64_t address, int32_t prev, int32_t next) {
    if (p->count == p->room) {
        int32_t room = p->room ? 2 * p->room : 4096;
        Block *grown = realloc(p->blocks, room * sizeof(Block));
        if (!grown) return -1;
        p->blocks = grown; p->room = room;
    }
    p->blocks[p->count] = (Block){size, address, prev, next, 0};
    return p->count++;
}

static void release_cached(Pool *p) {
    int32_t kept = 0;
    for (int32_t i = 0; i < p->free_count; i++) {
        Free f = p->frees[i];
        Block *b = &p->blocks[f.block];
        if (b->prev < 0 && b->next < 0) { b->free = 0; p->reserved -= b->size; }
        else p->frees[kept++] = f;
    }
    p->free_count = kept;
}

static void absorb(Pool *p, int32_t block, int32_t other, int before) {
    Block *b = &p->blocks[block], *o = &p->blocks[other];
    drop(p, find(p, o->size, o->address));
    o->free = 0;
    b->size += o->size;
    if (before) {
        b->address = o->address;
        b->prev = o->prev;
        if (b->prev >= 0) p->blocks[b->prev].next = block;
    } else {
        b->next = o->next;
        if (b->next >= 0) p->blocks[b->next].prev = block;
    }
}

static int give(Pool *p, int64_t key) {
    int32_t block = p->held[key];
    p->allocated -= p->blocks[block].size;
    int32_t before = p->blocks[block].prev, after = p->blocks[block].next;
    if (before >= 0 && p->blocks[before].free) absorb(p, block, before, 1);
    if (after >= 0 && p->blocks[after].free) absorb(p, block, after, 0);
    return keep(p, block);
}

/* 1: taken; 0: the cap is too small; -1: no memory here. */
static int take(Pool *p, int64_t key, int64_t size, int64_t cap) {
    int32_t block, place = find(p, size, 0);
    if (place < p->free_count) {
        block = p->frees[place].block;
        drop(p, place);
        p->blocks[block].free = 0;
    } else {
        int64_t segment = size < MIN_LARGE
            ? LARGE_BUFFER : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
        if (cap >= 0 && p->reserved + segment > cap) {
            release_cached(p);
            if (p->reserved + segment > cap) return 0;
        }
        p->reserved += segment;
        if (p->reserved > p->peak_reserved) p->peak_reserved = p->reserved;
        block = fresh(p, segment, p->next_address, -1, -1);
        if (block < 0) return -1;
        p->next_address += segment;
    }
    int64_t rest = p->blocks[block].size - size;
    if (rest > MIN_REMAINDER) {
        int32_t next = p->blocks[block].next;
        int32_t split = fresh(p, rest, p->blocks[block].address + size, block, next);
        if (split < 0) return -1;
        if (next >= 0) p->blocks[next].prev = split;
        p->blocks[block].next = split;
        p->blocks[block].size = size;
        if (!keep(p, split)) return -1;
    }
    p->held[key] = block;
    p->allocated += p->blocks[block].size;
    return 1;
}

static int run(Pool *p, const int64_t *events, Py_ssize_t count, const int64_t *sizes,
               Py_ssize_t blocks, int64_t base, int64_t cap) {
    if (base + blocks > p->held_room) {
        int64_t room = 2 * (base + blocks);
        int32_t *grown = realloc(p->held, room * sizeof(int32_t));
        if (!grown) return -1;
        p->held = grown; p->held_room = room;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t index = events[i] >= 0 ? events[i] : ~events[i];
        if (index >= blocks) return -2;
        int64_t size = sizes[index];
        if (events[i] < 0) {
            if (size <= SMALL) p->small -= size;
            else if (!give(p, base + index)) return -1;
            continue;
        }
        if (size <= SMALL) {
            p->small += size;
            if (p->small > p->small_peak) p->small_peak = p->small;
        } else {
            int taken = take(p, base + index, size, cap);
            if (taken != 1) return taken;
        }
        if (p->allocated + p->small > p->peak_allocated)
            p->peak_allocated = p->allocated + p->small;
    }
    return 1;
}

static PyObject *replay(PyObject *self, PyObject *args) {
    PyObject *parts;
    long long cap;
    if (!PyArg_ParseTuple(args, "OL", &parts, &cap)) return NULL;
    PyObject *items = PySequence_Fast(parts, "parts is a sequence");
    if (!items) return NULL;
    Pool pool = {0};
    int state = 1;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items) && state == 1; i++) {
        Py_buffer events, sizes;
        long long base;
        int flags;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, i), "y*y*Li", &events, &sizes, &base,
                              &flags)) {
            state = -3;
            break;
        }
        if (flags & RESET) {
            pool.peak_allocated = pool.allocated + pool.small;
            pool.peak_reserved = pool.reserved;
        }
        state = base < 0 ? -2 : run(&pool, events.buf, events.len / 8, sizes.buf, sizes.len / 8,
                                    base, flags & CAPPED ? cap : -1);
        if (flags & RELEASE) release_cached(&pool);
        PyBuffer_Release(&events);
        PyBuffer_Release(&sizes);
    }
    free(pool.blocks);
    free(pool.frees);
    free(pool.held);
    Py_DECREF(items);
    if (state == -1) return PyErr_NoMemory();
    if (state == -2) PyErr_SetString(PyExc_ValueError, "malformed events");
    if (state < 0) return NULL;
    return Py_BuildValue(
        "(OLLLLLL)", state ? Py_True : Py_False, (long long)(pool.allocated + pool.small),
        (long long)pool.peak_allocated, (long long)pool.reserved, (long long)pool.peak_reserved,
        (long long)pool.small, (long long)pool.small_peak);
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS, "Replay parts of events under a cap (-1: none)."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_replay", NULL, -1, methods};
PyMODINIT_FUNC PyInit__replay(void) { return PyModule_Create(&module); }
