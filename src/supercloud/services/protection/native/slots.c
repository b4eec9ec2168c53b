/* Which slots of the backing file are in use: one bit each, in memory only; rebuilt from the tree
 * at open, so that there is nothing of it to protect or to journal. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SEARCH_WORDS 1024u /* how far a long run is looked for before short ones do */

uint64_t tree_pages(uint64_t blocks)
{
    uint64_t total = 0;
    for (unsigned level = 1; level <= LEVELS; level++) {
        blocks = (blocks + FANOUT - 1) / FANOUT;
        total += blocks;
    }
    return total;
}

static uint64_t spare(uint64_t blocks)
{
    uint64_t wanted = blocks / 16;
    return wanted < 1024 ? 1024 : wanted > 262144 ? 262144 : wanted;
}

/* The end of the slots, in blocks of the file. The tree counts twice: a checkpoint must be able to
 * write every page anew beside the old one, however full the device is. */
uint64_t slots_for(uint64_t blocks)
{
    return FIRST_SLOT + blocks + 2 * tree_pages(blocks) + spare(blocks);
}

static bool in_use(const struct device *d, uint64_t slot)
{
    return d->used[slot / 64] >> (slot % 64) & 1;
}

static void set(struct device *d, uint64_t slot)
{
    d->used[slot / 64] |= 1ull << (slot % 64);
    d->free_slots--;
}

/* Make room for so many blocks; what is beyond the end counts as used. */
int slots_resize(struct device *d, uint64_t blocks)
{
    uint64_t end = slots_for(blocks), old_end = d->slots_end;
    size_t words = (size_t)(end + 63) / 64, old_words = (size_t)(old_end + 63) / 64;
    uint64_t *grown = realloc(d->used, words * 8);
    if (!grown)
        return ENOMEM;
    memset(grown + old_words, 0xff, (words - old_words) * 8);
    d->used = grown;
    for (uint64_t slot = old_end ? old_end : FIRST_SLOT; slot < end; slot++)
        d->used[slot / 64] &= ~(1ull << (slot % 64));
    d->free_slots += end - (old_end ? old_end : FIRST_SLOT);
    d->slots_end = end;
    d->reserve = tree_pages(blocks);
    d->hint = d->page_hint = FIRST_SLOT + blocks;
    return 0;
}

/* False when the slot is out of bounds or in use: the tree refers to it twice. */
bool slot_mark(struct device *d, uint32_t slot)
{
    if (slot < FIRST_SLOT || slot >= d->slots_end || in_use(d, slot))
        return false;
    set(d, slot);
    return true;
}

void slot_free(struct device *d, uint32_t slot)
{
    if (slot < FIRST_SLOT || slot >= d->slots_end || !in_use(d, slot))
        return;
    d->used[slot / 64] &= ~(1ull << (slot % 64));
    d->free_slots++;
}

/* The first slot of ``count`` free ones in a row, begun within some words of ``from``, or 0. */
static uint64_t find_run(const struct device *d, uint64_t from, size_t count)
{
    uint64_t run = 0, limit = from + SEARCH_WORDS * 64ull;
    if (limit > d->slots_end)
        limit = d->slots_end;
    for (uint64_t slot = from; slot < limit;) {
        uint64_t word = d->used[slot / 64] >> (slot % 64), rest = 64 - slot % 64;
        uint64_t same = word & 1 ? ~word : word; /* how many from here are alike: up to its first 1 */
        uint64_t alike = same ? (uint64_t)__builtin_ctzll(same) : rest;
        alike = alike < rest ? alike : rest;
        run = word & 1 ? 0 : run + alike;
        slot += alike;
        if (run >= count)
            return slot - run;
    }
    return 0;
}

/* Slots for a run of blocks: their homes (where a sequential reader would like them), else a run
 * elsewhere, else whatever is free. Returns how many; fewer or none when only the reserve is left. */
size_t slots_take(struct device *d, uint64_t block, size_t count, uint32_t *slots)
{
    uint64_t home = FIRST_SLOT + block, spared = d->free_slots > d->reserve ? d->free_slots - d->reserve : 0;
    uint64_t run = home;
    if (count > spared)
        count = (size_t)spared;
    if (count == 0)
        return 0;
    for (size_t i = 0; i < count && run; i++)
        if (in_use(d, home + i))
            run = 0;
    if (!run)
        run = find_run(d, d->hint, count);
    for (size_t i = 0; i < count; i++) {
        uint64_t slot = run ? run + i : find_run(d, d->hint, 1);
        if (!slot && !(slot = find_run(d, d->hint = FIRST_SLOT, 1)))
            while (!(slot = find_run(d, d->hint, 1)))
                d->hint += SEARCH_WORDS * 64ull; /* there is one: free_slots says so */
        slots[i] = (uint32_t)slot;
        set(d, slot);
        if (slot != home + i)
            d->hint = slot + 1 < d->slots_end ? slot + 1 : FIRST_SLOT;
    }
    return count;
}

int slot_take_for_page(struct device *d, uint32_t *taken)
{
    if (!d->free_slots)
        return ENOSPC; /* cannot be: every page has one in reserve */
    for (uint64_t from = d->page_hint;; from += SEARCH_WORDS * 64ull) {
        if (from >= d->slots_end)
            from = FIRST_SLOT;
        uint64_t slot = find_run(d, from, 1);
        if (slot) {
            set(d, slot);
            *taken = (uint32_t)slot;
            d->page_hint = slot + 1;
            return 0;
        }
    }
}
