/* torch's caching allocator: planner/memory/pools.py, in C, for speed.
 *
 * replay(parts, cap) -> (ok, allocated, peak_allocated, reserved, peak_reserved)
 * settle(load, steps, again, times, step, resolution) ->
 *     (allocated and its peak after load, peak_allocated, peak_reserved, cap)
 * shifted(events, starts, shifts, steps, times) -> events
 *
 * parts: a sequence of (events, sizes, base, flags). events: int64, i to allocate sizes[i], ~i to
 * release it; sizes: int64 bytes; base: added to i, so that parts may share or keep apart their
 * storages; flags: RELEASE, give cached segments back after the part; RESET, reset the peaks before
 * it; CAPPED, the cap holds in it. All counts are of both pools. Optional: the Python module does
 * the same (a test compares them).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { RELEASE = 1, RESET = 2, CAPPED = 4 };
static const int64_t MIN_BLOCK = 512, SMALL = 1 << 20, MIN_REMAINDER = (1 << 20) + 1, LARGE_BUFFER = 20 << 20, MIN_LARGE = 10 << 20,
                     ROUND_LARGE = 2 << 20, SMALL_BUFFER = 2 << 20;

typedef struct { int64_t size, address; int32_t prev, next; char free, kind; } Block;
/* Free blocks of one size, the lowest address last. An empty bin stays until a search meets it. */
typedef struct { int32_t *blocks; int32_t count, room; } Bin;

typedef struct { int64_t address, size; } Stretch;
typedef struct { Stretch *items; int32_t count, room; } Stretches; /* by ascending address */

/* planner/memory/addresses.py */
typedef struct { Stretches gaps, left, ranges; int64_t depth; } Space; /* depth: TOP less the lowest */

typedef struct {
    int64_t *sizes; Bin *bins; int32_t count, room; /* by ascending size */
    Bin *spare; int32_t spares; /* lists to use again, as many as room at most */
    int32_t hints[256]; /* by a hash of the size, where its bin was last */
} Bins;

enum { SMALL_POOL, LARGE_POOL, POOLS };

typedef struct {
    Block *blocks; int32_t count, room;
    int32_t spare; /* one more than a slot that is free to use, linked by `next`; 0 for none */
    Bins bins[POOLS];
    int32_t *held; int64_t held_room;
    Space space;
    int64_t allocated, peak_allocated, reserved, peak_reserved;
    int64_t refused; /* the least of the reserves that a cap has refused */
    int64_t changes, changes_before; /* of the segments: now, and when the last part started */
} Pool; /* both pools */

typedef struct { Py_buffer events, sizes; int64_t base; int flags; } Part;
typedef struct { Py_ssize_t part, event; } Place;

static const int64_t RANGE = 32 << 20, TOP = (int64_t)1 << 60;

static int32_t stretch_place(const Stretches *l, int64_t address) {
    int32_t low = 0, high = l->count;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (l->items[middle].address < address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static int stretch_add(Stretches *l, int64_t address, int64_t size) {
    if (l->count == l->room) {
        int32_t room = l->room ? 2 * l->room : 64;
        Stretch *grown = realloc(l->items, room * sizeof(Stretch));
        if (!grown) return 0;
        l->items = grown; l->room = room;
    }
    int32_t place = stretch_place(l, address);
    memmove(l->items + place + 1, l->items + place, (l->count - place) * sizeof(Stretch));
    l->items[place] = (Stretch){address, size};
    l->count++;
    return 1;
}

static void stretch_drop(Stretches *l, int32_t place) {
    memmove(l->items + place, l->items + place + 1, (l->count - place - 1) * sizeof(Stretch));
    l->count--;
}

/* Add a stretch, one with its free neighbours between low and high; it is returned in `joined`. */
static int stretch_join(Stretches *l, int64_t address, int64_t size, int64_t low, int64_t high,
                        Stretch *joined) {
    int32_t place = stretch_place(l, address);
    if (place < l->count && address + size < high && l->items[place].address == address + size) {
        size += l->items[place].size;
        stretch_drop(l, place);
    }
    if (place && address > low
        && l->items[place - 1].address + l->items[place - 1].size == address) {
        address = l->items[place - 1].address;
        size += l->items[place - 1].size;
        stretch_drop(l, place - 1);
    }
    *joined = (Stretch){address, size};
    return stretch_add(l, address, size);
}

/* -1: no memory here. */
static int64_t range_address(Space *s, int64_t whole) {
    int64_t step = whole & (whole - 1) ? RANGE : whole;
    for (int32_t place = s->gaps.count - 1; place >= 0; place--) {
        Stretch gap = s->gaps.items[place];
        int64_t address = (gap.address + gap.size - whole) / step * step;
        if (gap.address + gap.size < whole || address < gap.address) continue;
        stretch_drop(&s->gaps, place);
        int64_t after = gap.address + gap.size - address - whole;
        if (address > gap.address && !stretch_add(&s->gaps, gap.address, address - gap.address))
            return -1;
        if (after && !stretch_add(&s->gaps, address + whole, after)) return -1;
        return address;
    }
    int64_t low = TOP - s->depth, address = (low - whole) / step * step;
    if (address + whole < low
        && !stretch_add(&s->gaps, address + whole, low - address - whole)) return -1;
    s->depth = TOP - address;
    return address;
}

static int64_t space_take(Space *s, int64_t size) {
    for (int32_t place = 0; place < s->left.count; place++) {
        Stretch *left = &s->left.items[place];
        if (left->size < size) continue;
        int64_t address = left->address;
        left->address += size;
        left->size -= size;
        if (!left->size) stretch_drop(&s->left, place);
        return address;
    }
    int64_t whole = (size + RANGE - 1) / RANGE * RANGE, address = range_address(s, whole);
    if (address < 0 || !stretch_add(&s->ranges, address, whole)) return -1;
    if (whole > size && !stretch_add(&s->left, address + size, whole - size)) return -1;
    return address;
}

static int space_give(Space *s, int64_t address, int64_t size) {
    int32_t place = stretch_place(&s->ranges, address + 1) - 1;
    Stretch range = s->ranges.items[place], joined;
    if (!stretch_join(&s->left, address, size, range.address, range.address + range.size, &joined))
        return 0;
    if (joined.address != range.address || joined.size != range.size) return 1;
    stretch_drop(&s->ranges, place);
    stretch_drop(&s->left, stretch_place(&s->left, joined.address));
    return stretch_join(&s->gaps, range.address, range.size, 0, TOP, &joined);
}

static int32_t bin_place(Bins *l, int64_t size) {
    int32_t *hint = &l->hints[(uint64_t)size * 0x9E3779B97F4A7C15u >> 56];
    const int64_t *sizes = l->sizes;
    if (*hint < l->count && sizes[*hint] == size) return *hint;
    int32_t low = 0, left = l->count;
    while (left > 1) { /* without a branch that a processor would guess wrong */
        int32_t half = left / 2;
        low += sizes[low + half - 1] < size ? half : 0;
        left -= half;
    }
    return *hint = low + (left == 1 && sizes[low] < size);
}

/* Where a block of this address is in its bin, or would be. */
static int32_t place_in(const Pool *p, const Bin *bin, int64_t address) {
    int32_t low = 0, high = bin->count;
    if (!high || p->blocks[bin->blocks[high - 1]].address > address) return high;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (p->blocks[bin->blocks[middle]].address > address) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void drop(Pool *p, int32_t block) {
    const Block *b = &p->blocks[block];
    Bins *l = &p->bins[(int)b->kind];
    Bin *bin = &l->bins[bin_place(l, b->size)];
    int32_t place = place_in(p, bin, b->address);
    bin->count--;
    for (; place < bin->count; place++) bin->blocks[place] = bin->blocks[place + 1];
}

static int room_for_bin(Bins *l) {
    if (l->count < l->room) return 1;
    int32_t room = l->room ? 2 * l->room : 128;
    int64_t *sizes = realloc(l->sizes, room * sizeof(int64_t));
    if (sizes) l->sizes = sizes;
    Bin *bins = realloc(l->bins, room * sizeof(Bin));
    if (bins) l->bins = bins;
    Bin *spare = realloc(l->spare, room * sizeof(Bin));
    if (spare) l->spare = spare;
    if (!sizes || !bins || !spare) return 0;
    l->room = room;
    return 1;
}

static Bin *new_bin(Bins *l, int32_t place, int64_t size) {
    if (!room_for_bin(l)) return NULL;
    memmove(l->sizes + place + 1, l->sizes + place, (l->count - place) * sizeof(int64_t));
    memmove(l->bins + place + 1, l->bins + place, (l->count - place) * sizeof(Bin));
    l->sizes[place] = size;
    l->bins[place] = l->spares ? l->spare[--l->spares] : (Bin){NULL, 0, 0};
    l->count++;
    return &l->bins[place];
}

/* The bins from `first` to `after`, which are empty, go. */
static void drop_bins(Bins *l, int32_t first, int32_t after) {
    for (int32_t place = first; place < after; place++)
        if (l->spares < l->room) l->spare[l->spares++] = l->bins[place];
        else free(l->bins[place].blocks);
    memmove(l->sizes + first, l->sizes + after, (l->count - after) * sizeof(int64_t));
    memmove(l->bins + first, l->bins + after, (l->count - after) * sizeof(Bin));
    l->count -= after - first;
}

static int keep(Pool *p, int32_t block) {
    Block *b = &p->blocks[block];
    Bins *l = &p->bins[(int)b->kind];
    int32_t at = bin_place(l, b->size);
    Bin *bin = at < l->count && l->sizes[at] == b->size ? &l->bins[at] : new_bin(l, at, b->size);
    if (!bin) return 0;
    if (bin->count == bin->room) {
        int32_t room = bin->room ? 2 * bin->room : 8;
        int32_t *grown = realloc(bin->blocks, room * sizeof(int32_t));
        if (!grown) return 0;
        bin->blocks = grown; bin->room = room;
    }
    int32_t place = place_in(p, bin, b->address);
    for (int32_t k = bin->count++; k > place; k--) bin->blocks[k] = bin->blocks[k - 1];
    bin->blocks[place] = block;
    b->free = 1;
    return 1;
}

/* The free block of the least size that holds it, of those the lowest; -1 for none. */
static int32_t best_fit(Bins *l, int64_t size) {
    int32_t first = bin_place(l, size), place = first;
    while (place < l->count && !l->bins[place].count) place++;
    if (place > first) drop_bins(l, first, place);
    if (first == l->count) return -1;
    return l->bins[first].blocks[--l->bins[first].count];
}

static int32_t fresh(Pool *p, int64_t size, int64_t address, int32_t prev, int32_t next, char kind) {
    int32_t slot = p->spare - 1;
    if (slot >= 0) {
        p->spare = p->blocks[slot].next;
    } else {
        if (p->count == p->room) {
            int32_t room = p->room ? 2 * p->room : 4096;
            Block *grown = realloc(p->blocks, room * sizeof(Block));
            if (!grown) return -1;
            p->blocks = grown; p->room = room;
        }
        slot = p->count++;
    }
    p->blocks[slot] = (Block){size, address, prev, next, 0, kind};
    return slot;
}

static void forget(Pool *p, int32_t block) {
    p->blocks[block].free = 0;
    p->blocks[block].next = p->spare;
    p->spare = block + 1;
}

static int release_cached(Pool *p) {
    p->changes++;
    for (int kind = LARGE_POOL; kind >= SMALL_POOL; kind--)
        for (int32_t i = 0; i < p->bins[kind].count; i++) {
            Bin *bin = &p->bins[kind].bins[i];
            int32_t kept = bin->count, count = bin->count;
            for (int32_t k = count - 1; k >= 0; k--) { /* the lowest address first */
                Block *b = &p->blocks[bin->blocks[k]];
                if (b->prev < 0 && b->next < 0) {
                    p->reserved -= b->size;
                    if (!space_give(&p->space, b->address, b->size)) return 0;
                    forget(p, bin->blocks[k]);
                } else
                    bin->blocks[--kept] = bin->blocks[k];
            }
            memmove(bin->blocks, bin->blocks + kept, (count - kept) * sizeof(int32_t));
            bin->count = count - kept;
        }
    return 1;
}

static void absorb(Pool *p, int32_t block, int32_t other, int before) {
    Block *b = &p->blocks[block], *o = &p->blocks[other];
    drop(p, other);
    b->size += o->size;
    if (before) {
        b->address = o->address;
        b->prev = o->prev;
        if (b->prev >= 0) p->blocks[b->prev].next = block;
    } else {
        b->next = o->next;
        if (b->next >= 0) p->blocks[b->next].prev = block;
    }
    forget(p, other);
}

/* 1: given; -1: no memory here; -2: nothing is held under this key. */
static int give(Pool *p, int64_t key) {
    int32_t block = p->held[key];
    if (block < 0) return -2;
    p->held[key] = -1;
    p->allocated -= p->blocks[block].size;
    int32_t before = p->blocks[block].prev, after = p->blocks[block].next;
    if (before >= 0 && p->blocks[before].free) absorb(p, block, before, 1);
    if (after >= 0 && p->blocks[after].free) absorb(p, block, after, 0);
    return keep(p, block) ? 1 : -1;
}

/* 1: taken; 0: the cap is too small; -1: no memory here; 2: more than `stop` would be reserved
 * (nothing is done then; -1 for no stop). */
static int take(Pool *p, int64_t key, int64_t size, int64_t cap, int64_t stop) {
    char kind = size <= SMALL ? SMALL_POOL : LARGE_POOL;
    if (size < MIN_BLOCK) size = MIN_BLOCK;
    int32_t block = best_fit(&p->bins[(int)kind], size);
    if (block >= 0) {
        p->blocks[block].free = 0;
    } else {
        int64_t segment = kind == SMALL_POOL ? SMALL_BUFFER : size < MIN_LARGE
            ? LARGE_BUFFER : (size + ROUND_LARGE - 1) / ROUND_LARGE * ROUND_LARGE;
        if (stop >= 0 && p->reserved + segment > stop) return 2;
        if (cap >= 0 && p->reserved + segment > cap) {
            if (p->reserved + segment < p->refused) p->refused = p->reserved + segment;
            if (!release_cached(p)) return -1;
            if (p->reserved + segment > cap) {
                if (p->reserved + segment < p->refused) p->refused = p->reserved + segment;
                return 0;
            }
        }
        p->changes++;
        p->reserved += segment;
        if (p->reserved > p->peak_reserved) p->peak_reserved = p->reserved;
        int64_t address = space_take(&p->space, segment);
        block = address < 0 ? -1 : fresh(p, segment, address, -1, -1, kind);
        if (block < 0) return -1;
    }
    int64_t rest = p->blocks[block].size - size;
    if (rest >= (kind == SMALL_POOL ? MIN_BLOCK : MIN_REMAINDER)) {
        int32_t next = p->blocks[block].next;
        int32_t split = fresh(p, rest, p->blocks[block].address + size, block, next, kind);
        if (split < 0) return -1;
        if (next >= 0) p->blocks[next].prev = split;
        p->blocks[block].next = split;
        p->blocks[block].size = size;
        if (!keep(p, split)) return -1;
    }
    p->held[key] = block;
    p->allocated += p->blocks[block].size;
    if (p->allocated > p->peak_allocated) p->peak_allocated = p->allocated;
    return 1;
}

/* A part from `*at` on; where it stops is left there. */
static int run(Pool *p, const Part *part, Py_ssize_t *at, int64_t cap, int64_t stop) {
    const int64_t *events = part->events.buf, *sizes = part->sizes.buf, base = part->base;
    Py_ssize_t count = part->events.len / 8, blocks = part->sizes.len / 8;
    if (base < 0) return -2;
    if (base + blocks > p->held_room) {
        int64_t room = 2 * (base + blocks);
        int32_t *grown = realloc(p->held, room * sizeof(int32_t));
        if (!grown) return -1;
        memset(grown + p->held_room, -1, (room - p->held_room) * sizeof(int32_t));
        p->held = grown; p->held_room = room;
    }
    for (; *at < count; ++*at) {
        int64_t event = events[*at], index = event >= 0 ? event : ~event;
        if (index >= blocks) return -2;
        int state = event < 0 ? give(p, base + index)
                              : take(p, base + index, sizes[index], cap, stop);
        if (state != 1) return state;
    }
    return 1;
}

/* 1 if `again`, like the last part, which it repeats, only releases what it allocates. Where the
 * last part took and gave back no segment, it left the pool as it found it: free blocks join, so
 * segments and held blocks tell all. Then `again` meets what the last part met. */
static int repeats(const Pool *p, const Part *last, const Part *again) {
    if (p->changes != p->changes_before || last->base != again->base || last->flags & RELEASE
        || again->flags & RESET
        || last->events.buf != again->events.buf || last->sizes.buf != again->sizes.buf) return 0;
    const int64_t *events = again->events.buf;
    int64_t net = 0;
    for (Py_ssize_t i = 0; i < again->events.len / 8; i++) net += events[i] >= 0 ? 1 : -1;
    for (Py_ssize_t i = 0; i < again->sizes.len / 8 && !net; i++)
        net = p->held[again->base + i] >= 0;
    return !net;
}

/* Parts from `*at` on. `stop` holds where the cap does. */
static int run_all(Pool *p, const Part *parts, Py_ssize_t count, Place *at, int64_t cap,
                   int64_t stop) {
    for (; at->part < count; at->part++, at->event = 0) {
        const Part *part = &parts[at->part];
        int capped = part->flags & CAPPED;
        if (at->event == 0 && at->part > 0 && repeats(p, part - 1, part)) continue;
        if (at->event == 0) p->changes_before = p->changes;
        if (part->flags & RESET && at->event == 0) {
            p->peak_allocated = p->allocated;
            p->peak_reserved = p->reserved;
        }
        int state = run(p, part, &at->event, capped ? cap : -1, capped ? stop : -1);
        if (state != 1) return state;
        if (part->flags & RELEASE && !release_cached(p)) return -1;
    }
    return 1;
}

static void drop_parts(Part *parts, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) {
        PyBuffer_Release(&parts[i].events);
        PyBuffer_Release(&parts[i].sizes);
    }
    PyMem_Free(parts);
}

static Part *read_parts(PyObject *sequence, Py_ssize_t *count) {
    PyObject *items = PySequence_Fast(sequence, "parts is a sequence");
    if (!items) return NULL;
    *count = PySequence_Fast_GET_SIZE(items);
    Part *parts = PyMem_Calloc(*count + 1, sizeof(Part));
    if (!parts) PyErr_NoMemory();
    for (Py_ssize_t i = 0; parts && i < *count; i++) {
        long long base;
        if (!PyArg_ParseTuple(PySequence_Fast_GET_ITEM(items, i), "y*y*Li", &parts[i].events,
                              &parts[i].sizes, &base, &parts[i].flags)) {
            drop_parts(parts, i);
            parts = NULL;
        } else
            parts[i].base = base;
    }
    Py_DECREF(items);
    return parts;
}

static void drop_pool(Pool *p) {
    free(p->blocks);
    for (int kind = 0; kind < POOLS; kind++) {
        Bins *l = &p->bins[kind];
        for (int32_t i = 0; i < l->count; i++) free(l->bins[i].blocks);
        for (int32_t i = 0; i < l->spares; i++) free(l->spare[i].blocks);
        free(l->sizes);
        free(l->bins);
        free(l->spare);
    }
    free(p->held);
    free(p->space.gaps.items);
    free(p->space.left.items);
    free(p->space.ranges.items);
    memset(p, 0, sizeof(Pool));
}

static int copy_stretches(Stretches *to, const Stretches *from) {
    to->items = malloc((from->room + 1) * sizeof(Stretch));
    if (!to->items) return 0;
    if (from->count) memcpy(to->items, from->items, from->count * sizeof(Stretch));
    return 1;
}

/* `to` becomes a copy of `from`; what it had is dropped. */
static int copy_pool(Pool *to, const Pool *from) {
    drop_pool(to);
    *to = *from;
    for (int kind = 0; kind < POOLS; kind++) {
        Bins *l = &to->bins[kind];
        l->count = l->spares = 0; /* grows with the bins copied, for drop_pool */
        l->sizes = NULL;
        l->bins = l->spare = NULL;
    }
    to->space.gaps.items = to->space.left.items = to->space.ranges.items = NULL;
    to->blocks = malloc((from->room + 1) * sizeof(Block));
    to->held = malloc((from->held_room + 1) * sizeof(int32_t));
    if (!copy_stretches(&to->space.gaps, &from->space.gaps)
        || !copy_stretches(&to->space.left, &from->space.left)
        || !copy_stretches(&to->space.ranges, &from->space.ranges)) return -1;
    if (!to->blocks || !to->held) return -1;
    if (from->count) memcpy(to->blocks, from->blocks, from->count * sizeof(Block));
    if (from->held_room) memcpy(to->held, from->held, from->held_room * sizeof(int32_t));
    for (int kind = 0; kind < POOLS; kind++) {
        Bins *l = &to->bins[kind];
        const Bins *source = &from->bins[kind];
        l->sizes = malloc((source->room + 1) * sizeof(int64_t));
        l->bins = malloc((source->room + 1) * sizeof(Bin));
        l->spare = malloc((source->room + 1) * sizeof(Bin));
        if (!l->sizes || !l->bins || !l->spare) return -1;
        if (source->count) memcpy(l->sizes, source->sizes, source->count * sizeof(int64_t));
        for (int32_t i = 0; i < source->count; i++) {
            Bin *bin = &l->bins[i];
            *bin = source->bins[i];
            if (!(bin->blocks = malloc((bin->room + 1) * sizeof(int32_t)))) return -1;
            if (bin->count)
                memcpy(bin->blocks, source->bins[i].blocks, bin->count * sizeof(int32_t));
            l->count++;
        }
    }
    return 1;
}

static PyObject *failed(int state) {
    if (state == -1) return PyErr_NoMemory();
    if (state == -2) PyErr_SetString(PyExc_ValueError, "malformed events");
    return NULL;
}

static PyObject *replay(PyObject *self, PyObject *args) {
    PyObject *sequence;
    long long cap;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "OL", &sequence, &cap)) return NULL;
    Part *parts = read_parts(sequence, &count);
    if (!parts) return NULL;
    Pool pool = {0};
    Place at = {0, 0};
    int state = run_all(&pool, parts, count, &at, cap, -1);
    drop_parts(parts, count);
    PyObject *result = state < 0 ? failed(state) : Py_BuildValue(
        "(OLLLL)", state ? Py_True : Py_False, (long long)pool.allocated,
        (long long)pool.peak_allocated, (long long)pool.reserved, (long long)pool.peak_reserved);
    drop_pool(&pool);
    return result;
}

/* planner/memory/pools.py, settle, with fewer replays. What comes before more is reserved than the
 * least cap that can do is the same under every cap, and run once. A replay is the same under all
 * caps between the most that it reserved and the least that was refused it. */
typedef struct {
    const Part *parts; Py_ssize_t count;
    Pool before, pool; Place at; /* the common start, and a replay from it */
    int64_t passes_from, fails_below; /* the caps known by the last replays of either outcome */
    Pool passed; int64_t passed_from, passed_below; /* the state that the last success left */
} Search;

/* 1 or 0: the parts complete under `cap` or not. */
static int completes(Search *s, int64_t cap) {
    if (cap >= s->passes_from) return 1; /* the search only goes down from a success */
    if (cap < s->fails_below) return 0; /* and up from a failure */
    if (copy_pool(&s->pool, &s->before) < 0) return -1;
    Place at = s->at;
    s->pool.refused = INT64_MAX;
    s->pool.peak_reserved = s->pool.reserved;
    int state = run_all(&s->pool, s->parts, s->count, &at, cap, -1);
    if (state == 0) s->fails_below = s->pool.refused;
    if (state == 1) {
        Pool spare = s->passed;
        s->passed = s->pool;
        s->pool = spare;
        s->passes_from = s->passed_from = s->passed.peak_reserved;
        s->passed_below = s->passed.refused;
    }
    return state;
}

/* 1 or 0: `again`, so many times, completes after the parts, or not. */
static int settles(Search *s, const Part *again, int times, int64_t cap) {
    if (cap < s->passed_from || cap >= s->passed_below) {
        s->passes_from = INT64_MAX;
        s->fails_below = -1;
        int state = completes(s, cap);
        if (state != 1) return state;
    }
    if (s->count && repeats(&s->passed, &s->parts[s->count - 1], again)) return 1;
    if (copy_pool(&s->pool, &s->passed) < 0) return -1;
    int state = 1;
    for (int turn = 0; turn < times && state == 1; turn++) {
        Py_ssize_t event = 0;
        s->pool.changes_before = s->pool.changes;
        state = run(&s->pool, again, &event, cap, -1);
        if (state == 1 && repeats(&s->pool, again, again)) break;
    }
    return state;
}

static int search(Search *s, const Part *again, int times, int64_t low, int64_t high, int64_t step,
                  int64_t resolution, int64_t *found) {
    int state;
    s->fails_below = -1;
    if (high < low) high = low;
    low--;
    int64_t part = step > high / resolution ? step : high / resolution, last = low;
    while (high - last > part) last = (last + high) / 2; /* tried last, where all before it fail */
    if (last > low) {
        state = completes(s, last);
        if (state < 0) return state;
        if (!state) low = last;
    }
    while (high - low > (step > high / resolution ? step : high / resolution)) {
        int64_t middle = (low + high) / 2;
        state = completes(s, middle);
        if (state < 0) return state;
        if (state) high = middle;
        else low = middle;
    }
    while ((state = settles(s, again, times, high)) == 0)
        high += step > high / resolution ? step : high / resolution;
    *found = high;
    return state;
}

/* The most bytes of live tensors in the parts, from those live before. */
static int live_peak(const Part *parts, Py_ssize_t count, int64_t live, int64_t *peak) {
    *peak = live;
    for (Py_ssize_t i = 0; i < count; i++) {
        const int64_t *events = parts[i].events.buf, *sizes = parts[i].sizes.buf;
        Py_ssize_t blocks = parts[i].sizes.len / 8;
        for (Py_ssize_t k = 0; k < parts[i].events.len / 8; k++) {
            int64_t event = events[k], index = event >= 0 ? event : ~event;
            if (index >= blocks) return -2;
            live += event >= 0 ? sizes[index] : -sizes[index];
            if (live > *peak) *peak = live;
        }
    }
    return 1;
}

typedef struct { int64_t allocated, load_peak, peak_allocated, peak_reserved, cap; } Settled;

static int settle_all(Search *s, const Part *load, Py_ssize_t loads, const Part *again, int times,
                      int64_t step, int64_t resolution, Settled *r) {
    Pool *pool = &s->passed; /* without a cap: what every cap from its reserve on does, too */
    Place at = {0, 0};
    int64_t least;
    int state = run_all(pool, load, loads, &at, -1, -1);
    if (state < 0) return state;
    r->allocated = pool->allocated;
    r->load_peak = pool->peak_allocated;
    int64_t reserved = pool->reserved;
    state = live_peak(s->parts, s->count, r->allocated, &least);
    if (state < 0) return state;
    state = run_all(pool, s->parts, s->count, &s->at, -1, least > reserved ? least : reserved);
    if (state < 0 || copy_pool(&s->before, pool) < 0) return state < 0 ? state : -1;
    at = s->at;
    state = run_all(pool, s->parts, s->count, &at, -1, -1);
    if (state < 0) return state;
    r->peak_allocated = pool->peak_allocated;
    r->peak_reserved = s->passes_from = s->passed_from = pool->peak_reserved;
    s->passed_below = INT64_MAX;
    return search(s, again, times, r->peak_allocated > reserved ? r->peak_allocated : reserved, r->peak_reserved, step, resolution,
                  &r->cap);
}

static PyObject *settle(PyObject *self, PyObject *args) {
    PyObject *loading, *steps, *later;
    long long step, resolution;
    int times;
    Py_ssize_t loads = 0, count = 0, one = 0;
    if (!PyArg_ParseTuple(args, "OOOiLL", &loading, &steps, &later, &times, &step,
                          &resolution))
        return NULL;
    if (step < 1 || resolution < 1 || times < 0) return failed(-2);
    PyObject *tuple = PyTuple_Pack(1, later), *result = NULL;
    Part *load = read_parts(loading, &loads), *parts = load ? read_parts(steps, &count) : NULL;
    Part *again = parts && tuple ? read_parts(tuple, &one) : NULL;
    if (again) {
        Search s = {.parts = parts, .count = count};
        Settled r = {0};
        int state = settle_all(&s, load, loads, again, times, step, resolution, &r);
        drop_pool(&s.before);
        drop_pool(&s.pool);
        drop_pool(&s.passed);
        result = state < 0 ? failed(state) : Py_BuildValue(
            "(LLLLL)", (long long)r.allocated, (long long)r.load_peak, (long long)r.peak_allocated,
            (long long)r.peak_reserved, (long long)r.cap);
    }
    if (load) drop_parts(load, loads);
    if (parts) drop_parts(parts, count);
    if (again) drop_parts(again, one);
    Py_XDECREF(tuple);
    return result;
}

/* Events `times` over, with every index i moved by the shift of its stretch: shifts[r] where
 * starts[r] <= i < starts[r + 1], and steps[r] more each time. All are int64; starts ascend. */
static PyObject *shifted(PyObject *self, PyObject *args) {
    Py_buffer events, starts, shifts, steps;
    Py_ssize_t times;
    if (!PyArg_ParseTuple(args, "y*y*y*y*n", &events, &starts, &shifts, &steps, &times))
        return NULL;
    const int64_t *from = events.buf, *start = starts.buf, *shift = shifts.buf, *step = steps.buf;
    Py_ssize_t stretches = starts.len / 8, count = events.len / 8, place = 0;
    PyObject *result = NULL;
    if (!stretches || shifts.len != starts.len || steps.len != starts.len || times < 0) {
        failed(-2);
    } else if ((result = PyBytes_FromStringAndSize(NULL, events.len * times))) {
        int64_t *to = (int64_t *)PyBytes_AS_STRING(result);
        for (Py_ssize_t i = 0; i < count; i++) {
            int64_t index = from[i] >= 0 ? from[i] : ~from[i];
            while (place + 1 < stretches && index >= start[place + 1]) place++;
            while (place > 0 && index < start[place]) place--;
            index += shift[place];
            for (Py_ssize_t k = 0; k < times; k++, index += step[place])
                to[k * count + i] = from[i] >= 0 ? index : ~index;
        }
    }
    PyBuffer_Release(&steps);
    PyBuffer_Release(&events);
    PyBuffer_Release(&starts);
    PyBuffer_Release(&shifts);
    return result;
}

static PyMethodDef methods[] = {
    {"replay", replay, METH_VARARGS, "Replay parts of events under a cap (-1: none)."},
    {"settle", settle, METH_VARARGS, "Peaks of steps, and the smallest cap they complete under."},
    {"shifted", shifted, METH_VARARGS, "Events with their indices moved."},
    {NULL, NULL, 0, NULL},
};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_replay", NULL, -1, methods};
PyMODINIT_FUNC PyInit__replay(void) {
    PyObject *made = PyModule_Create(&module);
    if (made && PyModule_AddIntConstant(made, "VERSION", 5) < 0) Py_CLEAR(made); /* pools.py */
    return made;
}
