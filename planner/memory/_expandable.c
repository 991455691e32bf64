/* torch's caching allocator with expandable segments: planner/memory/allocator.py, in C, for speed.
 *
 * replay(parts, cap) -> (ok, allocated, peak_allocated, reserved, peak_reserved)
 *
 * parts and flags as in _replay.c; cap in bytes, -1 for none. Function by function as the Python
 * class, which a test holds it to. Optional: without it Python answers the same.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELEASE = 1, RESET = 2, CAPPED = 4 };
enum { SMALL_POOL, LARGE_POOL };
enum { NO_MEMORY = -1, OUT = 0, DONE = 1 }; /* OUT: the cap is too small */
static const int64_t MIN_BLOCK = 512, SMALL = 1 << 20, SMALL_BUFFER = 2 << 20,
                     LARGE_BUFFER = 20 << 20, MIN_LARGE = 10 << 20, ROUND_LARGE = 2 << 20,
                     SPACE = (int64_t)(20 << 20) << 19;

typedef struct { int64_t address, size; int32_t prev, next; char pool, allocated, mapped; } Block;
typedef struct { int64_t size, address; int32_t block; } Key;
typedef struct { Key *keys; int32_t *unmapped; int32_t count, room, holes, holes_room; } Pool;

typedef struct {
    Block *blocks; int32_t count, room;
    int32_t *dead; int32_t dead_count, dead_room;
    Pool pools[2];
    int32_t *held; int64_t held_room;
    int64_t cap, next_address, allocated, peak_allocated, reserved, peak_reserved;
} Allocator;

static int64_t segment_bytes(int pool) { return pool == SMALL_POOL ? SMALL_BUFFER : LARGE_BUFFER; }

static int grown(void **items, int32_t *room, int32_t count, size_t each) {
    if (count < *room) return 1;
    int32_t wider = *room ? 2 * *room : 256;
    void *new = realloc(*items, wider * each);
    if (!new) return 0;
    *items = new; *room = wider;
    return 1;
}

static int32_t new_block(Allocator *a, int64_t address, int64_t size, int pool) {
    int32_t block;
    if (a->dead_count) block = a->dead[--a->dead_count];
    else {
        if (!grown((void **)&a->blocks, &a->room, a->count, sizeof(Block))) return -1;
        block = a->count++;
    }
    a->blocks[block] = (Block){address, size, -1, -1, (char)pool, 0, 1};
    return block;
}

static int bury(Allocator *a, int32_t block) {
    if (!grown((void **)&a->dead, &a->dead_room, a->dead_count, sizeof(int32_t))) return 0;
    a->dead[a->dead_count++] = block;
    return 1;
}

static int32_t place_of(const Pool *p, int64_t size, int64_t address) {
    int32_t low = 0, high = p->count;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        const Key *k = &p->keys[middle];
        if (k->size < size || (k->size == size && k->address < address)) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void drop_key(Pool *p, int32_t place) {
    memmove(p->keys + place, p->keys + place + 1, (p->count - place - 1) * sizeof(Key));
    p->count--;
}

static int insert(Allocator *a, int32_t block) {
    const Block *b = &a->blocks[block];
    Pool *p = &a->pools[(int)b->pool];
    if (!grown((void **)&p->keys, &p->room, p->count, sizeof(Key))) return 0;
    int32_t place = place_of(p, b->size, b->address);
    memmove(p->keys + place + 1, p->keys + place, (p->count - place) * sizeof(Key));
    p->keys[place] = (Key){b->size, b->address, block};
    p->count++;
    return 1;
}

static void withdraw(Allocator *a, int32_t block) {
    const Block *b = &a->blocks[block];
    Pool *p = &a->pools[(int)b->pool];
    drop_key(p, place_of(p, b->size, b->address));
}

static int add_hole(Allocator *a, int32_t block) {
    Pool *p = &a->pools[(int)a->blocks[block].pool];
    if (!grown((void **)&p->unmapped, &p->holes_room, p->holes, sizeof(int32_t))) return 0;
    p->unmapped[p->holes++] = block;
    return 1;
}

static void drop_hole(Allocator *a, int32_t block) {
    Pool *p = &a->pools[(int)a->blocks[block].pool];
    for (int32_t i = 0; i < p->holes; i++)
        if (p->unmapped[i] == block) {
            p->unmapped[i] = p->unmapped[--p->holes];
            return;
        }
}

static void forget(Allocator *a, int32_t block) {
    if (a->blocks[block].mapped) withdraw(a, block);
    else drop_hole(a, block);
}

static void link_after(Allocator *a, int32_t block, int32_t rest) {
    a->blocks[rest].prev = block;
    a->blocks[rest].next = a->blocks[block].next;
    if (a->blocks[rest].next >= 0) a->blocks[a->blocks[rest].next].prev = rest;
    a->blocks[block].next = rest;
}

static int merge_neighbours(Allocator *a, int32_t block) {
    Block *b = &a->blocks[block];
    int32_t before = b->prev, after = b->next;
    if (before >= 0 && !a->blocks[before].allocated && a->blocks[before].mapped == b->mapped) {
        forget(a, before);
        b->address = a->blocks[before].address;
        b->size += a->blocks[before].size;
        b->prev = a->blocks[before].prev;
        if (b->prev >= 0) a->blocks[b->prev].next = block;
        if (!bury(a, before)) return 0;
    }
    if (after >= 0 && !a->blocks[after].allocated && a->blocks[after].mapped == b->mapped) {
        forget(a, after);
        b->size += a->blocks[after].size;
        b->next = a->blocks[after].next;
        if (b->next >= 0) a->blocks[b->next].prev = block;
        if (!bury(a, after)) return 0;
    }
    return 1;
}

static int64_t growable(const Allocator *a, const Key *key) {
    int32_t after = a->blocks[key->block].next;
    return key->size + (after >= 0 && !a->blocks[after].mapped ? a->blocks[after].size : 0);
}

/* Best fit, a block counting as large as it could grow; -1 for none. */
static int32_t cached(Allocator *a, int pool, int64_t size) {
    Pool *p = &a->pools[pool];
    int32_t place = place_of(p, size, 0);
    if (place == p->count) return -1;
    while (place + 1 < p->count && growable(a, &p->keys[place + 1]) < growable(a, &p->keys[place]))
        place++;
    int32_t block = p->keys[place].block;
    drop_key(p, place);
    return block;
}

/* The lowest free stretch that ends in unmapped space and holds `size`; -1 for none. */
static int32_t room_for(const Allocator *a, int pool, int64_t size) {
    const Pool *p = &a->pools[pool];
    int64_t best = INT64_MAX;
    int32_t found = -1;
    for (int32_t i = 0; i < p->holes; i++) {
        int32_t start = p->unmapped[i], before = a->blocks[start].prev;
        int64_t address = a->blocks[start].address, available = 0;
        if (address >= best) continue;
        if (before >= 0 && !a->blocks[before].allocated) start = before;
        for (int32_t b = start; b >= 0 && !a->blocks[b].allocated && available < size;
             b = a->blocks[b].next) available += a->blocks[b].size;
        if (available < size) continue;
        best = address;
        found = start;
    }
    return found;
}

/* Back the first `size` bytes of an unmapped block, in whole pages of its pool. */
static int map_pages(Allocator *a, int32_t block, int64_t size) {
    int pool = a->blocks[block].pool;
    int64_t page = segment_bytes(pool), mapped = (size + page - 1) / page * page;
    drop_hole(a, block);
    if (mapped > a->blocks[block].size) mapped = a->blocks[block].size;
    a->blocks[block].mapped = 1;
    if (mapped < a->blocks[block].size) {
        int32_t rest = new_block(a, a->blocks[block].address + mapped,
                                 a->blocks[block].size - mapped, pool);
        if (rest < 0) return NO_MEMORY;
        a->blocks[rest].mapped = 0;
        a->blocks[block].size = mapped;
        link_after(a, block, rest);
        if (!add_hole(a, rest)) return NO_MEMORY;
    }
    if (!merge_neighbours(a, block) || !insert(a, block)) return NO_MEMORY;
    a->reserved += mapped;
    if (a->reserved > a->peak_reserved) a->peak_reserved = a->reserved;
    return a->cap >= 0 && a->reserved > a->cap ? OUT : DONE;
}

static int grow(Allocator *a, int pool, int64_t size, int32_t *found) {
    int32_t block = room_for(a, pool, size);
    if (block < 0) {
        int64_t page = segment_bytes(pool), address = (a->next_address + page - 1) / page * page;
        block = new_block(a, address, SPACE, pool);
        if (block < 0) return NO_MEMORY;
        a->next_address = address + SPACE;
        a->blocks[block].mapped = 0;
        if (!add_hole(a, block)) return NO_MEMORY;
    }
    while (!a->blocks[block].mapped || a->blocks[block].size < size) {
        int32_t hole = block;
        int64_t missing = size;
        if (a->blocks[block].mapped) {
            hole = a->blocks[block].next;
            missing -= a->blocks[block].size;
        }
        if (missing > a->blocks[hole].size) missing = a->blocks[hole].size;
        int state = map_pages(a, hole, missing);
        if (state != DONE) return state;
        block = hole; /* what was before it is part of it now */
    }
    withdraw(a, block);
    *found = block;
    return DONE;
}

/* A fresh block in `found`, -1 where the cap forbids it. */
static int fresh(Allocator *a, int pool, int64_t size, int32_t *found) {
    int64_t wanted = pool == SMALL_POOL ? SMALL_BUFFER
        : size < MIN_LARGE ? LARGE_BUFFER : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
    *found = -1;
    if (a->cap >= 0 && a->reserved + wanted > a->cap) return DONE;
    return grow(a, pool, size, found);
}

/* Give back the whole pages inside a free block. */
static int unmap(Allocator *a, int32_t block) {
    int pool = a->blocks[block].pool;
    int64_t page = segment_bytes(pool), from = a->blocks[block].address;
    int64_t start = (from + page - 1) / page * page, to = from + a->blocks[block].size;
    int64_t end = to / page * page;
    if (start >= end || !a->blocks[block].mapped) return 1;
    withdraw(a, block);
    int32_t hole = block;
    if (start > from) {
        hole = new_block(a, start, to - start, pool);
        if (hole < 0) return 0;
        a->blocks[block].size = start - from;
        link_after(a, block, hole);
        if (!insert(a, block)) return 0;
    }
    if (to > end) {
        int32_t rest = new_block(a, end, to - end, pool);
        if (rest < 0) return 0;
        a->blocks[hole].size -= to - end;
        link_after(a, hole, rest);
        if (!insert(a, rest)) return 0;
    }
    a->blocks[hole].mapped = 0;
    if (!merge_neighbours(a, hole) || !add_hole(a, hole)) return 0;
    a->reserved -= end - start;
    return 1;
}

static int empty_cache(Allocator *a) {
    for (int pool = LARGE_POOL; pool >= SMALL_POOL; pool--) {
        Pool *p = &a->pools[pool];
        int32_t count = p->count, *found = malloc((count + 1) * sizeof(int32_t));
        if (!found) return 0;
        for (int32_t i = 0; i < count; i++) found[i] = p->keys[i].block;
        int ok = 1;
        for (int32_t i = 0; i < count && ok; i++) ok = unmap(a, found[i]);
        free(found);
        if (!ok) return 0;
    }
    return 1;
}

static int take(Allocator *a, int64_t key, int64_t size) {
    size = size < MIN_BLOCK ? MIN_BLOCK : (size + MIN_BLOCK - 1) / MIN_BLOCK * MIN_BLOCK;
    int pool = size <= SMALL ? SMALL_POOL : LARGE_POOL, state = DONE;
    int32_t block = cached(a, pool, size);
    if (block < 0) state = fresh(a, pool, size, &block);
    if (state != DONE) return state;
    if (block < 0) {
        if (!empty_cache(a)) return NO_MEMORY;
        state = fresh(a, pool, size, &block);
        if (state != DONE || block < 0) return state == DONE ? OUT : state;
    }
    int64_t left = a->blocks[block].size - size;
    if (left >= MIN_BLOCK) {
        int32_t rest = new_block(a, a->blocks[block].address + size, left, pool);
        if (rest < 0) return NO_MEMORY;
        a->blocks[block].size = size;
        link_after(a, block, rest);
        if (!insert(a, rest)) return NO_MEMORY;
    }
    a->blocks[block].allocated = 1;
    a->held[key] = block;
    a->allocated += a->blocks[block].size;
    if (a->allocated > a->peak_allocated) a->peak_allocated = a->allocated;
    return DONE;
}

/* -2: nothing is held under this key. */
static int give(Allocator *a, int64_t key) {
    int32_t block = a->held[key];
    if (block < 0) return -2;
    a->held[key] = -1;
    a->allocated -= a->blocks[block].size;
    a->blocks[block].allocated = 0;
    return merge_neighbours(a, block) && insert(a, block) ? DONE : NO_MEMORY;
}

static int run(Allocator *a, const int64_t *events, Py_ssize_t count, const int64_t *sizes,
               Py_ssize_t blocks, int64_t base) {
    if (base < 0) return -2;
    if (base + blocks > a->held_room) {
        int64_t room = 2 * (base + blocks);
        int32_t *wider = realloc(a->held, room * sizeof(int32_t));
        if (!wider) return NO_MEMORY;
        memset(wider + a->held_room, -1, (room - a->held_room) * sizeof(int32_t));
        a->held = wider; a->held_room = room;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        int64_t index = events[i] >= 0 ? events[i] : ~events[i];
        if (index >= blocks) return -2;
        int state = events[i] >= 0 ? take(a, base + index, sizes[index]) : give(a, base + index);
        if (state != DONE) return state;
    }
    return DONE;
}

static PyObject *replay(PyObject *self, PyObject *args) {
    PyObject *parts;
    long long cap;
    if (!PyArg_ParseTuple(args, "OL", &parts, &cap)) return NULL;
    PyObject *items = PySequence_Fast(parts, "parts is a sequence");
    if (!items) return NULL;
    Allocator a = {.next_address = ROUND_LARGE};
    int state = DONE;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(items) && state == DONE; i++) {
        Py_buffer events, sizes;
        long long base;
        int flags;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, i), "y*y*Li", &events, &sizes, &base,
                              &flags)) {
            state = -3;
            break;
        }
        if (flags & RESET) {
            a.peak_allocated = a.allocated;
            a.peak_reserved = a.reserved;
        }
        a.cap = flags & CAPPED ? cap : -1;
        state = run(&a, events.buf, events.len / 8, sizes.buf, sizes.len / 8, base);
        if (state == DONE && flags & RELEASE && !empty_cache(&a)) state = NO_MEMORY;
        PyBuffer_Release(&events);
        PyBuffer_Release(&sizes);
    }
    free(a.blocks);
    free(a.dead);
    free(a.held);
    for (int pool = 0; pool < 2; pool++) {
        free(a.pools[pool].keys);
        free(a.pools[pool].unmapped);
    }
    Py_DECREF(items);
    if (state == NO_MEMORY) return PyErr_NoMemory();
    if (state == -2) PyErr_SetString(PyExc_ValueError, "malformed events");
    if (state < 0) return NULL;
    return Py_BuildValue("(OLLLL)", state == DONE ? Py_True : Py_False, (long long)a.allocated,
                         (long long)a.peak_allocated, (long long)a.reserved,
                         (long long)a.peak_reserved);
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS, "Replay parts of events under a cap (-1: none)."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_expandable", NULL, -1, methods};
PyMODINIT_FUNC PyInit__expandable(void) { return PyModule_Create(&module); }
