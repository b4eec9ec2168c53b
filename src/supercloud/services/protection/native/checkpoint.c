/* The tree is written anew where it changed, leaves first, each page beside its old copy, up to the
 * root, which the superblock holds. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int by_index(const void *a, const void *b)
{
    const struct page *x = ((const struct touched *)a)->page, *y = ((const struct touched *)b)->page;
    return (x->index > y->index) - (x->index < y->index);
}

/* The lock is held: the leaves' images are of the same moment as the transaction. */
int checkpoint_begin(struct device *d, struct checkpoint *c)
{
    c->room = d->dirty_count * LEVELS + LEVELS;
    c->pages = calloc(c->room, sizeof *c->pages);
    c->images = aligned((d->dirty_count + 1) * (size_t)BLOCK);
    if (!c->pages || !c->images)
        return ENOMEM;
    for (size_t i = 0; i < d->page_count; i++)
        if (d->pages[i]->dirty && d->pages[i]->level == 1)
            c->pages[c->count++].page = d->pages[i];
    qsort(c->pages, c->count, sizeof *c->pages, by_index);
    for (size_t i = 0; i < c->count; i++) {
        struct page *p = c->pages[i].page;
        memcpy(c->images + i * BLOCK, p->entries, BLOCK);
        p->dirty = false;
        p->writing = true;
        p->refs++;
        d->dirty_count--;
    }
    c->leaves = c->count;
    return 0;
}

/* Seals and writes the pages first..last of one level, whose images are given. */
static int write_level(struct worker *w, struct touched *pages, size_t count, uint8_t *images)
{
    struct device *d = w->device;
    int error = 0;
    pthread_mutex_lock(&d->lock);
    for (size_t i = 0; i < count && !error; i++)
        error = slot_take_for_page(d, &pages[i].entry.slot);
    pthread_mutex_unlock(&d->lock);
    for (size_t i = 0; i < count && !error; i++) {
        struct binding b = bind_to(d, pages[i].page->level, pages[i].page->index);
        error = seal(w, &b, &pages[i].entry, images + i * BLOCK, BLOCK, images + i * BLOCK);
    }
    for (size_t i = 0, n; i < count && !error; i += n) {
        for (n = 1; i + n < count && pages[i + n].entry.slot == pages[i].entry.slot + n;)
            n++;
        error = d->backing.write(d->backing.context, images + i * BLOCK, n * BLOCK,
                                 (uint64_t)pages[i].entry.slot * BLOCK);
    }
    return error;
}

/* Enters the children's new places into their parents, which are touched by that. Only commits change
 * parents, and there is one at a time. */
static int raise(struct worker *w, struct checkpoint *c, size_t first, size_t last)
{
    struct device *d = w->device;
    int error = 0;
    pthread_mutex_lock(&d->lock);
    for (size_t i = first; i < last && !error; i++) {
        uint64_t index = c->pages[i].page->index;
        struct page *p = c->count > last ? c->pages[c->count - 1].page : NULL;
        if (!p || p->index != index / FANOUT) {
            error = page_get(w, c->pages[i].page->level + 1u, index / FANOUT, &p);
            if (error)
                break;
            p->writing = true;
            c->pages[c->count++].page = p;
        }
        p->entries[index % FANOUT] = c->pages[i].entry;
    }
    pthread_mutex_unlock(&d->lock);
    return error;
}

int checkpoint_write(struct worker *w, struct checkpoint *c)
{
    uint8_t *images = c->images;
    size_t first = 0;
    int error = 0;
    for (unsigned level = 1; c->count > first && !error; level++) {
        size_t last = c->count;
        error = write_level(w, c->pages + first, last - first, images);
        if (!error && level < LEVELS)
            error = raise(w, c, first, last);
        for (size_t i = last; i < c->count; i++) /* the leaves' images are written: room for their parents' */
            memcpy(images + (i - last) * BLOCK, c->pages[i].page->entries, BLOCK);
        first = last;
    }
    return error;
}

/* Done: the old copies' slots are free. Not done: the new ones' are, and all is dirty as before. */
void checkpoint_end(struct device *d, struct checkpoint *c, bool done)
{
    for (size_t i = 0; i < c->count; i++) {
        struct page *p = c->pages[i].page;
        uint32_t unneeded = done ? p->home : c->pages[i].entry.slot;
        if (unneeded)
            slot_free(d, unneeded);
        if (done) {
            p->home = c->pages[i].entry.slot;
            if (i >= c->leaves && p->dirty) { /* from one that failed */
                p->dirty = false;
                d->dirty_count--;
            }
        } else {
            page_dirty(d, p);
        }
        p->writing = false;
        page_put(d, p);
    }
}
