/* Opening: the newest superblock, the records that follow it, and the comparison with the root that
 * the user keeps. Nothing is written here. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

const uint8_t SUPER_MAGIC[8] = {'s', 'c', 'p', 'r', 'o', 't', 'e', '1'};

int super_write(struct worker *w, unsigned which, uint64_t sequence, const struct entry *root,
                uint8_t chain[CHAIN_BYTES])
{
    struct device *d = w->device;
    struct super *s = aligned(BLOCK);
    struct super_body body = {.sequence = sequence, .blocks = d->blocks, .root = *root};
    struct binding b = bind_to(d, KIND_SUPER, which);
    struct entry e = {0};
    int error = s ? 0 : ENOMEM;
    if (error)
        return error;
    b.count = VERSION;
    memset(s, 0, sizeof *s);
    memcpy(body.chain_before, chain, CHAIN_BYTES);
    memcpy(s->body, &body, sizeof body);
    error = seal(w, &b, &e, s->body, sizeof s->body, s->body);
    memcpy(s->magic, SUPER_MAGIC, sizeof s->magic);
    s->counter = e.counter;
    s->epoch = e.epoch;
    s->version = VERSION;
    memcpy(s->tag, e.tag, TAG_BYTES);
    if (!error)
        error = chain_on(chain, (uint8_t *)s, sizeof *s, chain);
    if (!error)
        error = d->backing.write(d->backing.context, s, sizeof *s, (uint64_t)which * BLOCK);
    free(s);
    return error;
}

/* One superblock; false when it is none of this device's. */
static bool super_read(struct worker *w, unsigned which, struct super_body *body, uint32_t *epoch,
                       uint8_t chain[CHAIN_BYTES])
{
    struct device *d = w->device;
    struct super *s = aligned(BLOCK);
    struct binding b = bind_to(d, KIND_SUPER, which);
    uint8_t plain[sizeof s->body];
    bool good = s && !d->backing.read(d->backing.context, s, sizeof *s, (uint64_t)which * BLOCK) &&
                memcmp(s->magic, SUPER_MAGIC, sizeof s->magic) == 0 && s->version == VERSION;
    if (good) {
        struct entry e = {.epoch = s->epoch, .counter = s->counter};
        memcpy(e.tag, s->tag, TAG_BYTES);
        b.count = VERSION;
        good = unseal(w, &b, &e, s->body, sizeof s->body, plain);
    }
    if (good) {
        memcpy(body, plain, sizeof *body);
        *epoch = s->epoch;
        good = body->blocks && body->blocks <= MAX_BLOCKS &&
               chain_on(body->chain_before, (uint8_t *)s, sizeof *s, chain) == 0;
    }
    free(s);
    return good;
}

static int newest_super(struct worker *w)
{
    struct device *d = w->device;
    struct super_body best = {0};
    for (unsigned which = 0; which < 2; which++) {
        struct super_body body;
        uint8_t chain[CHAIN_BYTES];
        uint32_t epoch;
        if (!super_read(w, which, &body, &epoch, chain) || body.sequence <= best.sequence)
            continue;
        best = body;
        d->super = which;
        d->found_epoch = epoch;
        memcpy(d->chain, chain, CHAIN_BYTES);
    }
    if (!best.sequence)
        return SC_NOT_A_DEVICE;
    d->sequence = best.sequence;
    d->blocks = best.blocks;
    d->root = best.root;
    return d->backing.size(d->backing.context) < slots_for(d->blocks) * BLOCK ? SC_TRUNCATED : 0;
}

/* Opens the record at ``at`` in place, if it is the one that follows; its blocks, or 0. */
static size_t record_open(struct worker *w, uint8_t *journal, size_t at, uint64_t sequence, const uint8_t *chain,
                          uint8_t *next_chain)
{
    struct device *d = w->device;
    struct record *r = (struct record *)(void *)(journal + at * BLOCK);
    struct binding b = bind_to(d, KIND_RECORD, sequence);
    if (at >= JOURNAL_BLOCKS || memcmp(r->magic, RECORD_MAGIC, sizeof r->magic) || r->sequence != sequence ||
        !r->count || r->count > RECORD_ROOM || at + record_blocks(r->count) > JOURNAL_BLOCKS ||
        r->epoch < d->found_epoch)
        return 0;
    struct entry e = {.epoch = r->epoch, .counter = r->counter};
    memcpy(e.tag, r->tag, TAG_BYTES);
    b.count = r->count;
    memcpy(b.chain, chain, CHAIN_BYTES);
    size_t size = record_blocks(r->count);
    if (chain_on(chain, journal + at * BLOCK, size * BLOCK, next_chain) ||
        !unseal(w, &b, &e, r->body, r->count * sizeof(struct change), r->body))
        return 0;
    return size;
}

static struct entry entry_of(const struct change *c)
{
    struct entry e = {.slot = c->slot, .epoch = c->epoch, .counter = c->counter};
    memcpy(e.tag, c->tag, TAG_BYTES);
    return e;
}

/* Is all that a record refers to on the disk? Only of the last one that is not a matter of course. */
static bool complete(struct worker *w, const struct record *r)
{
    struct device *d = w->device;
    const struct change *changes = (const struct change *)r->body;
    for (uint32_t i = 0; i < r->count; i++) {
        struct entry e = entry_of(&changes[i]);
        struct binding b = bind_to(d, 0, changes[i].block);
        if (e.slot && (d->backing.read(d->backing.context, w->scratch, BLOCK, (uint64_t)e.slot * BLOCK) ||
                       !unseal(w, &b, &e, w->scratch, BLOCK, w->scratch)))
            return false;
    }
    return true;
}

static void apply(struct worker *w, const struct record *r)
{
    struct device *d = w->device;
    const struct change *changes = (const struct change *)r->body;
    for (uint32_t i = 0; i < r->count; i++) {
        struct page *p;
        if (changes[i].block >= d->blocks || page_get(w, 1, changes[i].block / FANOUT, &p)) {
            d->damaged = true;
            continue;
        }
        p->entries[changes[i].block % FANOUT] = entry_of(&changes[i]);
        page_dirty(d, p);
        page_put(d, p);
    }
}

/* Does this state contradict the trusted root? */
static int compare(const struct device *d, const struct sc_root *trusted)
{
    return d->sequence == trusted->sequence && memcmp(d->chain, trusted->chain, KEPT_BYTES) ? SC_FORKED : 0;
}

/* To its end, also when it contradicts the trusted root: so that what was found can be said. */
static int replay(struct worker *w, uint8_t *journal, const struct sc_root *trusted)
{
    struct device *d = w->device;
    int forked = compare(d, trusted);
    uint8_t chain[CHAIN_BYTES], after[CHAIN_BYTES];
    size_t size = record_open(w, journal, 0, d->sequence + 1, d->chain, chain);
    while (size) {
        const struct record *r = (const struct record *)(void *)(journal + (size_t)d->journal_at * BLOCK);
        size_t next = record_open(w, journal, d->journal_at + size, d->sequence + 2, chain, after);
        if (!next && d->sequence + 1 > trusted->sequence && !complete(w, r)) {
            evidence(d, EVIDENCE_DISCARDED, 0, r->count, NULL);
            return 0;
        }
        apply(w, r);
        d->sequence++;
        d->found_epoch = r->epoch;
        d->journal_at += (uint32_t)size;
        memcpy(d->chain, chain, CHAIN_BYTES);
        memcpy(chain, after, CHAIN_BYTES);
        forked = forked ? forked : compare(d, trusted);
        size = next;
    }
    return forked;
}

static void mark(struct device *d, const struct page *leaf)
{
    for (unsigned i = 0; i < FANOUT; i++) {
        uint32_t slot = leaf->entries[i].slot;
        if (slot && (leaf->index * FANOUT + i >= d->blocks || !slot_mark(d, slot)))
            d->damaged = true;
    }
}

/* Marks what a page and all below it occupies. What cannot be authenticated leaves the device
 * readable only: nobody knows which slots it occupies, so none may be written. */
static void walk(struct worker *w, unsigned level, uint64_t index)
{
    struct device *d = w->device;
    struct page *p;
    if (page_get(w, level, index, &p)) {
        d->damaged = true;
        return;
    }
    if (p->home && !slot_mark(d, p->home))
        d->damaged = true;
    for (unsigned i = 0; i < FANOUT && level > 1; i++)
        if (p->entries[i].slot)
            walk(w, level - 1, index * FANOUT + i);
    if (level == 1)
        mark(d, p);
    page_put(d, p);
}

/* Leaves that only the journal has made. */
static void mark_new_leaves(struct device *d)
{
    for (size_t i = 0; i < d->page_count; i++)
        if (d->pages[i]->level == 1 && d->pages[i]->dirty && !d->pages[i]->home)
            mark(d, d->pages[i]);
}

static int judge(const struct device *d, const struct sc_root *trusted, uint32_t promised)
{
    if (d->sequence < trusted->sequence || d->found_epoch < trusted->epoch)
        return SC_ROLLED_BACK;
    return d->found_epoch > promised ? SC_EPOCH : 0;
}

/* ``trusted->reserved`` is the last epoch that was promised to an opening. ``found`` is also set
 * where the trusted root contradicts it. The lock is held. */
int recover(struct worker *w, const struct sc_root *trusted, struct sc_root *found)
{
    struct device *d = w->device;
    int error = newest_super(w);
    if (error || (error = slots_resize(d, d->blocks)))
        return error;
    uint8_t *journal = aligned(JOURNAL_BLOCKS * (size_t)BLOCK);
    if (!journal)
        return ENOMEM;
    error = d->backing.read(d->backing.context, journal, JOURNAL_BLOCKS * (size_t)BLOCK, JOURNAL_AT * BLOCK);
    if (!error)
        error = replay(w, journal, trusted);
    wipe(journal, JOURNAL_BLOCKS * (size_t)BLOCK);
    free(journal);
    *found = (struct sc_root){.sequence = d->sequence, .epoch = d->found_epoch};
    memcpy(found->chain, d->chain, CHAIN_BYTES);
    if (error || (error = judge(d, trusted, trusted->reserved)))
        return error;
    walk(w, LEVELS, 0);
    mark_new_leaves(d);
    return 0;
}
