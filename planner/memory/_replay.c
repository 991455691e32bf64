/* The large pool of torch's caching allocator: planner/memory/large_pool.py, in C, for speed.
 *
 * replay(parts, cap) -> (ok, allocated, peak_allocated, reserved, peak_reserved)
 *
 * parts: a sequence of (events, levels, flags). events: int64 pairs (storage, bytes), bytes 0 to
 * release; levels: int64, what the small pool holds from each event to the next, or None;
 * flags: RELEASE, give cached segments back after the part; RESET, reset the peaks before it;
 * CAPPED, the cap holds in it. Optional: the Python module does the same (a test compares them).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELEASE = 1, RESET = 2, CAPPED = 4 };
static const int64_t MIN_REMAINDER = 1 << 20, LARGE_BUFFER = 20 << 20, MIN_LARGE = 10 << 20,
                     ROUND_LARGE = 2 << 20;

typedef struct { int64_t size, address; int32_t prev, next; char free; } Block;
typedef struct { int64_t size, address; int32_t block; } Free;

typedef struct {
    Block *blocks; int32_t count, room;
    Free *frees; int32_t free_count, free_room;
    int32_t *held; int64_t held_room;
    int64_t next_address, allocated, peak_allocated, reserved, peak_reserved;
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

static int run(Pool *p, const int64_t *events, Py_ssize_t count, const int64_t *levels,
               int64_t cap) {
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t key = events[2 * i], size = events[2 * i + 1];
        if (key < 0) return -2;
        if (key >= p->held_room) {
            int64_t room = 2 * key + 1024;
            int32_t *grown = realloc(p->held, room * sizeof(int32_t));
            if (!grown) return -1;
            p->held = grown; p->held_room = room;
        }
        if (!size) {
            if (!give(p, key)) return -1;
            continue;
        }
        int taken = take(p, key, size, cap);
        if (taken != 1) return taken;
        int64_t live = p->allocated + (levels ? levels[i] : 0);
        if (live > p->peak_allocated) p->peak_allocated = live;
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
        Py_buffer events, levels = {0};
        PyObject *with;
        int flags;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, i), "y*Oi", &events, &with, &flags)) {
            state = -3;
            break;
        }
        if (with != Py_None && PyObject_GetBuffer(with, &levels, PyBUF_SIMPLE) < 0) {
            PyBuffer_Release(&events);
            state = -3;
            break;
        }
        if (flags & RESET) {
            pool.peak_allocated = pool.allocated;
            pool.peak_reserved = pool.reserved;
        }
        Py_ssize_t count = events.len / 16;
        if (levels.buf && levels.len / 8 < count) state = -2;
        else state = run(&pool, events.buf, count, levels.buf, flags & CAPPED ? cap : -1);
        if (flags & RELEASE) release_cached(&pool);
        PyBuffer_Release(&events);
        if (levels.buf) PyBuffer_Release(&levels);
    }
    free(pool.blocks);
    free(pool.frees);
    free(pool.held);
    Py_DECREF(items);
    if (state == -1) return PyErr_NoMemory();
    if (state == -2) PyErr_SetString(PyExc_ValueError, "malformed events");
    if (state < 0) return NULL;
    return Py_BuildValue("(OLLLL)", state ? Py_True : Py_False, (long long)pool.allocated,
                         (long long)pool.peak_allocated, (long long)pool.reserved,
                         (long long)pool.peak_reserved);
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS, "Replay parts of events under a cap (-1: none)."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_replay", NULL, -1, methods};
PyMODINIT_FUNC PyInit__replay(void) { return PyModule_Create(&module); }
