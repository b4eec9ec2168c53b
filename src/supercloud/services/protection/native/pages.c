/* The tree's pages in memory: authenticated when they are read, kept while dirty, let go by a clock. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>


static size_t bucket_of(unsigned level, uint64_t index)
{
    return (size_t)((index * 0x9e3779b97f4a7c15ull ^ level * 0xc2b2ae3d27d4eb4full) >> 40) % BUCKETS;
}

struct page *page_cached(struct device *d, unsigned level, uint64_t index)
{
    struct page *p = d->buckets[bucket_of(level, index)];
    while (p && (p->level != level || p->index != index))
        p = p->next;
    return p;
}

static void forget(struct device *d, struct page *p)
{
    struct page **at = &d->buckets[bucket_of(p->level, p->index)];
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
}

static void destroy(struct page *p)
{
    wipe(p->entries, BLOCK);
    free(p->entries);
    free(p);
}

/* One clean, idle page goes, if there is one among the next few. */
static void evict(struct device *d)
{
    for (size_t turn = 0; turn < 64 && d->page_count; turn++) {
        d->hand = (d->hand + 1) % d->page_count;
        struct page *p = d->pages[d->hand];
        if (p->refs || p->dirty || p->writing || p->state != PAGE_READY)
            continue;
        if (p->used) {
            p->used = false;
            continue;
        }
        forget(d, p);
        d->pages[d->hand] = d->pages[--d->page_count];
        destroy(p);
        return;
    }
}

static struct page *make(struct device *d, unsigned level, uint64_t index)
{
    if (d->page_count >= d->page_limit)
        evict(d);
    if (d->page_count == d->page_room) {
        size_t room = d->page_room ? 2 * d->page_room : 256;
        struct page **grown = realloc(d->pages, room * sizeof *grown);
        if (!grown)
            return NULL;
        d->pages = grown;
        d->page_room = room;
    }
    struct page *p = calloc(1, sizeof *p);
    if (!p)
        return NULL;
    if (!(p->entries = aligned(BLOCK))) {
        free(p);
        return NULL;
    }
    p->level = (uint8_t)level;
    p->index = index;
    p->refs = 1;
    p->next = d->buckets[bucket_of(level, index)];
    d->buckets[bucket_of(level, index)] = p;
    d->pages[d->page_count++] = p;
    return p;
}

static void drop_failed(struct device *d, struct page *p)
{
    for (size_t i = 0; i < d->page_count; i++)
        if (d->pages[i] == p) {
            d->pages[i] = d->pages[--d->page_count];
            break;
        }
    destroy(p);
}

void page_put(struct device *d, struct page *p)
{
    if (--p->refs == 0 && p->state == PAGE_FAILED)
        drop_failed(d, p);
}

void page_dirty(struct device *d, struct page *p)
{
    if (!p->dirty)
        d->dirty_count++;
    p->dirty = true;
}

/* What the page must be, by its parent, which is authenticated itself. */
static int expected(struct worker *w, unsigned level, uint64_t index, struct entry *e)
{
    struct page *parent;
    if (level == LEVELS) {
        *e = w->device->root;
        return 0;
    }
    int error = page_get(w, level + 1, index / FANOUT, &parent);
    if (error)
        return error;
    *e = parent->entries[index % FANOUT];
    page_put(w->device, parent);
    return 0;
}

static int load(struct worker *w, struct page *p)
{
    struct device *d = w->device;
    struct entry e;
    int error = expected(w, p->level, p->index, &e);
    if (error)
        return error;
    p->home = e.slot;
    if (e.slot == 0) {
        memset(p->entries, 0, BLOCK);
        return 0;
    }
    struct binding b = bind_to(d, p->level, p->index);
    pthread_mutex_unlock(&d->lock);
    error = d->backing.read(d->backing.context, p->entries, BLOCK, (uint64_t)e.slot * BLOCK);
    bool authentic = !error && unseal(w, &b, &e, (uint8_t *)p->entries, BLOCK, (uint8_t *)p->entries);
    pthread_mutex_lock(&d->lock);
    if (!error && !authentic)
        evidence(d, EVIDENCE_PAGE, p->level, p->index, &e);
    return authentic ? 0 : EIO;
}

/* The page, referenced; EIO when it is not what it was when it was written. Others wait for the
 * one that reads it. A page that is being read is not dirty, so its place does not change. */
int page_get(struct worker *w, unsigned level, uint64_t index, struct page **out)
{
    struct device *d = w->device;
    struct page *p = page_cached(d, level, index);
    if (p) {
        p->refs++;
        p->used = true;
        while (p->state == PAGE_LOADING)
            pthread_cond_wait(&d->loaded, &d->lock);
    } else {
        if (!(p = make(d, level, index)))
            return ENOMEM;
        int error = load(w, p);
        if (error)
            forget(d, p);
        p->state = error ? PAGE_FAILED : PAGE_READY;
        pthread_cond_broadcast(&d->loaded);
    }
    if (p->state == PAGE_FAILED) {
        page_put(d, p);
        return EIO;
    }
    *out = p;
    return 0;
}

void pages_free(struct device *d)
{
    for (size_t i = 0; i < d->page_count; i++)
        destroy(d->pages[i]);
    free(d->pages);
    free(d->buckets);
}
