/* Reading, writing and zeroing blocks. A write never touches what is in use: it goes to free slots,
 * and the entry that points there makes it visible; a commit makes it durable. */
#include "engine.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* For whoever watches the event descriptor. When nobody reads, the newest are dropped and counted. */
void evidence(struct device *d, uint32_t kind, unsigned level, uint64_t index, const struct entry *e)
{
    static const struct entry nothing;
    const uint64_t one = 1;
    const struct entry *at = e ? e : &nothing;
    pthread_mutex_lock(&d->evidence_lock);
    if (kind == EVIDENCE_BLOCK || kind == EVIDENCE_PAGE)
        d->refused++;
    if (d->evidence_count - d->evidence_read < EVIDENCE_RING) {
        d->ring[d->evidence_count++ % EVIDENCE_RING] = (struct sc_evidence){
            .kind = kind, .level = level, .index = index, .slot = at->slot,
            .epoch = at->epoch, .counter = at->counter, .sequence = d->sequence};
    }
    pthread_mutex_unlock(&d->evidence_lock);
    if (write(d->event_fd, &one, sizeof one) < 0) {
        /* full: the reader is told already */
    }
}

/* The entries of a run of blocks. */
static int entries_of(struct worker *w, uint64_t block, size_t count, struct entry *entries)
{
    struct device *d = w->device;
    int error = 0;
    pthread_mutex_lock(&d->lock);
    for (size_t i = 0; i < count && !error;) {
        struct page *p;
        size_t at = (size_t)((block + i) % FANOUT), n = FANOUT - at < count - i ? FANOUT - at : count - i;
        error = page_get(w, 1, (block + i) / FANOUT, &p);
        if (error)
            break;
        memcpy(entries + i, p->entries + at, n * sizeof *entries);
        page_put(d, p);
        i += n;
    }
    pthread_mutex_unlock(&d->lock);
    return error;
}

static bool same(const struct entry *a, const struct entry *b)
{
    return memcmp(a, b, sizeof *a) == 0;
}

/* Transfers runs of slots that follow each other with one call each. */
static int transfer(struct device *d, bool writing, const struct entry *entries, size_t count, uint8_t *data)
{
    for (size_t i = 0; i < count;) {
        size_t n = 1;
        if (!entries[i].slot) {
            memset(data + i * BLOCK, 0, BLOCK); /* only when reading */
            i++;
            continue;
        }
        while (i + n < count && entries[i + n].slot == entries[i].slot + n)
            n++;
        uint64_t offset = (uint64_t)entries[i].slot * BLOCK;
        int error = writing ? d->backing.write(d->backing.context, data + i * BLOCK, n * BLOCK, offset)
                            : d->backing.read(d->backing.context, data + i * BLOCK, n * BLOCK, offset);
        if (error)
            return error;
        i += n;
    }
    return 0;
}

/* ``data`` is aligned. What fails authentication is read once more when it was overwritten, and its
 * slot used again, in between: its entry is another then. */
static int read_blocks(struct worker *w, uint64_t block, size_t count, uint8_t *data)
{
    struct device *d = w->device;
    for (size_t done = 0; done < count;) {
        size_t left = count - done;
        int error = entries_of(w, block + done, left, w->entries);
        if (!error)
            error = transfer(d, false, w->entries, left, data + done * BLOCK);
        if (error)
            return error;
        for (size_t i = 0; i < left; i++, done++) {
            struct entry used = w->entries[i], current;
            struct binding b = bind_to(d, 0, block + done);
            uint8_t *at = data + done * BLOCK;
            if (!used.slot || unseal(w, &b, &used, at, BLOCK, at))
                continue;
            if ((error = entries_of(w, block + done, 1, &current)))
                return error;
            if (!same(&used, &current))
                break;
            evidence(d, EVIDENCE_BLOCK, 0, block + done, &used);
            return EIO;
        }
    }
    return 0;
}

int device_read(struct worker *w, uint64_t offset, uint8_t *data, size_t length)
{
    bool straight = offset % BLOCK == 0 && length % BLOCK == 0 && (uintptr_t)data % BLOCK == 0;
    while (length) {
        size_t skip = (size_t)(offset % BLOCK), most = CHUNK_BYTES - skip;
        size_t n = length < most ? length : most;
        uint8_t *to = straight ? data : w->scratch;
        int error = read_blocks(w, offset / BLOCK, (skip + n + BLOCK - 1) / BLOCK, to);
        if (error)
            return error;
        if (!straight)
            memcpy(data, to + skip, n);
        offset += n, data += n, length -= n;
    }
    return 0;
}

static void change(struct device *d, struct page *p, uint64_t block, const struct entry *e)
{
    size_t at = (size_t)(block % FANOUT);
    uint64_t bit = 1ull << (at % 64), *tx = &p->in_tx[at / 64];
    uint32_t old = p->entries[at].slot;
    p->entries[at] = *e;
    page_dirty(d, p);
    if (*tx & bit) {
        if (old)
            slot_free(d, old); /* no state that could come back ever referred to it */
        return;
    }
    *tx |= bit;
    if (!d->tx.block_count)
        d->tx_since_ns = now_ns();
    d->tx.blocks[d->tx.block_count++] = (uint32_t)block;
    if (old)
        d->tx.freed[d->tx.freed_count++] = old;
}

/* Makes entries the blocks' own; with ``expected`` only while the one block's is still that (else
 * EAGAIN). On an error those slots are free again that did not become visible. */
int install(struct worker *w, uint64_t block, size_t count, const struct entry *entries, const struct entry *expected)
{
    struct device *d = w->device;
    size_t done = 0;
    int error = 0;
    pthread_mutex_lock(&d->lock);
    while (done < count && !error) {
        struct page *p;
        error = page_get(w, 1, (block + done) / FANOUT, &p);
        if (error)
            break;
        error = tx_reserve(&d->tx, FANOUT);
        if (!error && expected && !same(expected, &p->entries[block % FANOUT]))
            error = EAGAIN;
        for (; !error && done < count; done++) {
            const struct entry *e = &entries[done];
            if ((block + done) / FANOUT != p->index)
                break;
            if (e->slot || p->entries[(block + done) % FANOUT].slot)
                change(d, p, block + done, e);
        }
        page_put(d, p);
    }
    for (size_t i = done; i < count; i++)
        if (entries[i].slot)
            slot_free(d, entries[i].slot);
    bool much = d->tx.block_count >= TX_BLOCKS || d->dirty_count >= d->page_limit / 2;
    uint64_t number = d->tx_number;
    pthread_mutex_unlock(&d->lock);
    if (much && !error)
        error = device_commit_number(w, number, false);
    return error;
}

/* Slots for as many of the blocks as there is room for; commits free what was overwritten. */
static int take(struct worker *w, uint64_t block, size_t count, size_t *taken)
{
    struct device *d = w->device;
    for (unsigned attempt = 0;; attempt++) {
        pthread_mutex_lock(&d->lock);
        *taken = slots_take(d, block, count, w->slots);
        pthread_mutex_unlock(&d->lock);
        if (*taken)
            return 0;
        int error = device_commit(w, attempt % 8 == 7);
        if (error)
            return error;
        if (attempt > 8)
            usleep(1000); /* other writers hold all there is for a moment */
    }
}

static int write_blocks(struct worker *w, uint64_t block, size_t count, const uint8_t *data,
                        const struct entry *expected)
{
    struct device *d = w->device;
    while (count) {
        size_t n;
        int error = take(w, block, count, &n);
        if (error)
            return error;
        for (size_t i = 0; i < n; i++) {
            struct binding b = bind_to(d, 0, block + i);
            w->entries[i].slot = w->slots[i];
            if (seal(w, &b, &w->entries[i], data + i * BLOCK, BLOCK, w->scratch + i * BLOCK))
                error = EIO;
        }
        if (!error)
            error = transfer(d, true, w->entries, n, w->scratch);
        if (error) {
            pthread_mutex_lock(&d->lock);
            for (size_t i = 0; i < n; i++)
                slot_free(d, w->slots[i]);
            pthread_mutex_unlock(&d->lock);
            room_note(d, error);
            return error;
        }
        if ((error = install(w, block, n, w->entries, expected)))
            return error;
        block += n, count -= n, data += n * BLOCK;
    }
    return 0;
}

/* Less than a block: read, merge, and write if nobody else wrote it meanwhile, else again. */
static int write_part(struct worker *w, uint64_t offset, const uint8_t *data, size_t length)
{
    __attribute__((aligned(BLOCK))) uint8_t merged[BLOCK];
    int error;
    do {
        error = read_blocks(w, offset / BLOCK, 1, merged);
        if (error)
            break;
        struct entry before = w->entries[0];
        if (data)
            memcpy(merged + offset % BLOCK, data, length);
        else
            memset(merged + offset % BLOCK, 0, length);
        error = write_blocks(w, offset / BLOCK, 1, merged, &before);
    } while (error == EAGAIN);
    wipe(merged, sizeof merged);
    return error;
}

static bool refused(struct device *d, int *error)
{
    *error = d->dead ? EIO : d->damaged || !d->serving ? EROFS : 0;
    return *error;
}

int device_write(struct worker *w, uint64_t offset, const uint8_t *data, size_t length)
{
    int error = 0;
    if (refused(w->device, &error))
        return error;
    while (length && !error) {
        size_t skip = (size_t)(offset % BLOCK), n = length;
        if (skip || length < BLOCK) {
            n = BLOCK - skip < length ? BLOCK - skip : length;
            error = write_part(w, offset, data, n);
        } else {
            n = length < CHUNK_BYTES ? length / BLOCK * BLOCK : CHUNK_BYTES;
            error = write_blocks(w, offset / BLOCK, n / BLOCK, data, NULL);
        }
        offset += n, data += n, length -= n;
    }
    return error;
}

/* Zeros are not stored. TRIM is for whole blocks only; WRITE_ZEROES zeroes the edges too. */
int device_zero(struct worker *w, uint64_t offset, uint64_t length, bool whole_blocks_only)
{
    int error = 0;
    if (refused(w->device, &error))
        return error;
    while (length && !error) {
        uint64_t skip = offset % BLOCK, n = length;
        if (skip || length < BLOCK) {
            n = BLOCK - skip < length ? BLOCK - skip : length;
            error = whole_blocks_only ? 0 : write_part(w, offset, NULL, (size_t)n);
        } else {
            n = length < CHUNK_BYTES ? length / BLOCK * BLOCK : CHUNK_BYTES;
            memset(w->entries, 0, sizeof w->entries);
            error = install(w, offset / BLOCK, (size_t)(n / BLOCK), w->entries, NULL);
        }
        offset += n, length -= n;
    }
    return error;
}

/* Whether a block is stored, and for how many from it on (at most ``most``) the same holds. Of what
 * cannot be read nothing better is said than that it is stored. */
bool device_mapped(struct worker *w, uint64_t block, uint64_t *run, uint64_t most)
{
    bool mapped = true;
    most = most < CHUNK_BLOCKS ? most : CHUNK_BLOCKS;
    *run = most;
    if (entries_of(w, block, (size_t)most, w->entries))
        return true;
    mapped = w->entries[0].slot != 0;
    for (*run = 1; *run < most && (w->entries[*run].slot != 0) == mapped;)
        ++*run;
    return mapped;
}
