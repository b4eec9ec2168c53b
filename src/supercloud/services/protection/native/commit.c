/* Durability. A commit is one record in the journal, written after the data and synced with it; or,
 * when the journal or the cache is full, a checkpoint of the tree and a superblock. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

const uint8_t RECORD_MAGIC[8] = {'s', 'c', 'p', 'j', 'r', 'n', 'l', '1'};

static int grow(uint32_t **list, size_t *room, size_t wanted)
{
    size_t more = *room ? *room : 1024;
    while (more < wanted)
        more *= 2;
    uint32_t *grown = more == *room ? *list : realloc(*list, more * sizeof **list);
    if (!grown)
        return ENOMEM;
    *list = grown;
    *room = more;
    return 0;
}

int tx_reserve(struct tx *tx, size_t more)
{
    int error = grow(&tx->blocks, &tx->block_room, tx->block_count + more);
    return error ? error : grow(&tx->freed, &tx->freed_room, tx->freed_count + more);
}

void tx_free(struct tx *tx)
{
    free(tx->blocks);
    free(tx->freed);
    memset(tx, 0, sizeof *tx);
}

size_t record_blocks(uint64_t count)
{
    return (size_t)((sizeof(struct record) + count * sizeof(struct change) + BLOCK - 1) / BLOCK);
}

static void clear_marks(struct device *d, const struct tx *tx)
{
    for (size_t i = 0; i < tx->block_count; i++) {
        struct page *p = page_cached(d, 1, tx->blocks[i] / FANOUT);
        memset(p->in_tx, 0, sizeof p->in_tx); /* dirty, hence there */
    }
}

/* The record's plaintext: the changed blocks' entries of this moment. The lock is held. */
static int collect(struct device *d, const struct tx *tx)
{
    size_t room = record_blocks(tx->block_count) * BLOCK;
    if (room > d->record_room) {
        uint8_t *grown = aligned(room);
        if (!grown)
            return ENOMEM;
        free(d->record);
        d->record = grown;
        d->record_room = room;
    }
    memset(d->record, 0, room);
    struct change *changes = (struct change *)((struct record *)(void *)d->record)->body;
    for (size_t i = 0; i < tx->block_count; i++) {
        uint32_t block = tx->blocks[i];
        const struct entry *e = &page_cached(d, 1, block / FANOUT)->entries[block % FANOUT];
        changes[i] = (struct change){.block = block, .slot = e->slot, .epoch = e->epoch, .counter = e->counter};
        memcpy(changes[i].tag, e->tag, TAG_BYTES);
    }
    return 0;
}

static int record_write(struct worker *w, size_t count, uint64_t sequence, uint8_t chain[CHAIN_BYTES])
{
    struct device *d = w->device;
    struct record *r = (struct record *)(void *)d->record;
    struct binding b = bind_to(d, KIND_RECORD, sequence);
    struct entry e = {0};
    size_t size = record_blocks(count) * BLOCK;
    b.count = (uint32_t)count;
    memcpy(b.chain, chain, CHAIN_BYTES);
    int error = seal(w, &b, &e, r->body, count * sizeof(struct change), r->body);
    if (error)
        return error;
    memcpy(r->magic, RECORD_MAGIC, sizeof r->magic);
    r->sequence = sequence;
    r->counter = e.counter;
    r->epoch = e.epoch;
    r->count = (uint32_t)count;
    memcpy(r->tag, e.tag, TAG_BYTES);
    uint64_t at = (JOURNAL_AT + (uint64_t)d->journal_at) * BLOCK;
    if ((error = chain_on(chain, d->record, size, chain)) ||
        (error = d->backing.write(d->backing.context, d->record, size, at)))
        return error;
    return 0;
}

/* What was not made durable is part of the open transaction again. The lock is held. */
static int merge_back(struct device *d, struct tx *tx)
{
    size_t more = tx->block_count > tx->freed_count ? tx->block_count : tx->freed_count;
    int error = tx_reserve(&d->tx, more);
    if (error)
        return error;
    for (size_t i = 0; i < tx->block_count; i++) {
        uint32_t block = tx->blocks[i], at = block % FANOUT;
        struct page *p = page_cached(d, 1, block / FANOUT);
        if (p->in_tx[at / 64] >> (at % 64) & 1)
            continue;
        p->in_tx[at / 64] |= 1ull << (at % 64);
        d->tx.blocks[d->tx.block_count++] = block;
    }
    if (tx->freed_count)
        memcpy(d->tx.freed + d->tx.freed_count, tx->freed, tx->freed_count * sizeof *tx->freed);
    d->tx.freed_count += tx->freed_count;
    return 0;
}

static void die(struct device *d)
{
    if (!atomic_exchange(&d->dead, true))
        evidence(d, EVIDENCE_DEAD, 0, 0, NULL);
}

/* After a failed sync nobody knows what is on the disk (the kernel may have dropped it): no further
 * write is taken until the device is opened again, which finds out. */
static int sync_or_die(struct device *d)
{
    int error = d->backing.sync(d->backing.context);
    if (error)
        die(d);
    return error;
}

static int make_durable(struct worker *w, size_t count, struct checkpoint *tree, uint64_t sequence,
                        uint8_t chain[CHAIN_BYTES])
{
    struct device *d = w->device;
    int error = tree ? checkpoint_write(w, tree) : record_write(w, count, sequence, chain);
    if (error || (error = sync_or_die(d)))
        return error;
    if (tree) { /* all that it refers to is there now */
        const struct entry *root = tree->count ? &tree->pages[tree->count - 1].entry : &d->root;
        error = super_write(w, d->super ^ 1, sequence, root, chain);
        if (!error)
            error = sync_or_die(d);
        else
            die(d); /* a superblock of which nobody knows whether it is there */
    }
    return error;
}

static void settle(struct device *d, struct tx *tx, struct checkpoint *tree, uint64_t number)
{
    for (size_t i = 0; i < tx->freed_count; i++)
        slot_free(d, tx->freed[i]);
    d->durable_tx = number;
    d->sequence++;
    if (tree) {
        d->super ^= 1;
        d->journal_at = 0;
        d->grown = false;
        if (tree->count)
            d->root = tree->pages[tree->count - 1].entry;
        d->checkpoints++;
    } else {
        d->journal_at += (uint32_t)record_blocks(tx->block_count);
    }
    d->commits++;
}

/* Both locks are held; the inner one is given up for the writing. */
static int commit(struct worker *w, bool checkpoint)
{
    struct device *d = w->device;
    struct tx tx = d->tx;
    struct checkpoint tree = {0};
    uint8_t chain[CHAIN_BYTES];
    uint64_t number = d->tx_number++, sequence = d->sequence + 1;
    bool as_tree = checkpoint || d->grown || tx.block_count > RECORD_ROOM || d->dirty_count >= d->page_limit / 2 ||
                   d->journal_at + record_blocks(tx.block_count) > JOURNAL_BLOCKS;
    int error = as_tree ? checkpoint_begin(d, &tree) : collect(d, &tx);
    memcpy(chain, d->chain, CHAIN_BYTES);
    memset(&d->tx, 0, sizeof d->tx);
    clear_marks(d, &tx);
    if (!error) {
        pthread_mutex_unlock(&d->lock);
        error = make_durable(w, tx.block_count, as_tree ? &tree : NULL, sequence, chain);
        pthread_mutex_lock(&d->lock);
    }
    checkpoint_end(d, &tree, !error);
    if (!error) {
        settle(d, &tx, as_tree ? &tree : NULL, number);
        memcpy(d->chain, chain, CHAIN_BYTES);
    } else if (merge_back(d, &tx)) {
        die(d);
    }
    free(tree.pages);
    free(tree.images);
    tx_free(&tx);
    return error;
}

/* Returns when all that was visible in transaction ``number`` is durable. Who waited while another
 * made it so has nothing left to do: flushes that come together cost one. */
int device_commit_number(struct worker *w, uint64_t number, bool checkpoint)
{
    struct device *d = w->device;
    int error = 0;
    pthread_mutex_lock(&d->commit_lock);
    pthread_mutex_lock(&d->lock);
    if (d->dead)
        error = EIO;
    else if (checkpoint || (d->durable_tx < number && d->tx.block_count))
        error = commit(w, checkpoint);
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->commit_lock);
    room_note(d, error);
    return error;
}

int device_commit(struct worker *w, bool checkpoint)
{
    pthread_mutex_lock(&w->device->lock);
    uint64_t number = w->device->tx_number;
    pthread_mutex_unlock(&w->device->lock);
    return device_commit_number(w, number, checkpoint);
}
