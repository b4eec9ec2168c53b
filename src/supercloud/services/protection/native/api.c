/* What the binding calls. Each call may come from any thread; none is made after sc_close. */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define HOUSEKEEPING_S 1
#define UNCOMMITTED_NS 2000000000ull /* what nobody flushed is committed after that time */

struct handle {
    struct device d;
    struct worker w;
    pthread_mutex_t calls; /* the worker is one thread's at a time */
};

static int file_read(void *context, void *data, size_t length, uint64_t offset)
{
    for (uint8_t *to = data; length;) {
        ssize_t n = pread(*(int *)context, to, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? errno : EIO; /* the file is shorter than it was */
        to += n, offset += (uint64_t)n, length -= (size_t)n;
    }
    return 0;
}

static int file_write(void *context, const void *data, size_t length, uint64_t offset)
{
    for (const uint8_t *from = data; length;) {
        ssize_t n = pwrite(*(int *)context, from, length, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n ? errno : EIO;
        from += n, offset += (uint64_t)n, length -= (size_t)n;
    }
    return 0;
}

static int file_sync(void *context)
{
    int result;
    do
        result = fdatasync(*(int *)context);
    while (result && errno == EINTR);
    return result ? errno : 0;
}

static uint64_t file_size(void *context)
{
    struct stat status;
    return fstat(*(int *)context, &status) || !S_ISREG(status.st_mode) ? 0 : (uint64_t)status.st_size;
}

static void destroy(struct handle *h)
{
    struct device *d = &h->d;
    worker_free(&h->w);
    pages_free(d);
    tx_free(&d->tx);
    free(d->used);
    free(d->record);
    if (d->event_fd >= 0)
        close(d->event_fd);
    if (d->fd >= 0)
        close(d->fd);
    munlock(d->key, KEY_BYTES);
    wipe(d, sizeof *d);
    free(h);
}

/* A handle over ``fd`` (from then on the handle's) or, for tests, over ``other``. */
static struct handle *make(int fd, const struct sc_backing *other, const uint8_t *key, const uint8_t *id,
                           uint64_t cache_pages)
{
    struct handle *h = calloc(1, sizeof *h);
    if (!h)
        return NULL;
    struct device *d = &h->d;
    d->fd = fd;
    d->backing = other ? *other : (struct sc_backing){file_read, file_write, file_sync, file_size, &d->fd};
    d->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&h->calls, NULL);
    pthread_mutex_init(&d->lock, NULL);
    pthread_mutex_init(&d->commit_lock, NULL);
    pthread_mutex_init(&d->large_lock, NULL);
    pthread_mutex_init(&d->evidence_lock, NULL);
    pthread_cond_init(&d->loaded, NULL);
    pthread_cond_init(&d->wake, NULL);
    pthread_cond_init(&d->room, NULL);
    (void)mlock(d->key, KEY_BYTES); /* may be over a limit; then it may be swapped */
    memcpy(d->key, key, KEY_BYTES);
    memcpy(d->id, id, ID_BYTES);
    d->page_limit = cache_pages < 64 ? 64 : (size_t)cache_pages;
    d->tx_number = 1;
    d->counter = 1;
    d->buckets = calloc(BUCKETS, sizeof *d->buckets);
    if (d->event_fd < 0 || !d->buckets || worker_make(&h->w, d)) {
        d->fd = -1;
        destroy(h);
        return NULL;
    }
    return h;
}

static void *housekeeping(void *argument)
{
    struct handle *h = argument;
    struct device *d = &h->d;
    struct worker w;
    if (worker_make(&w, d))
        return NULL;
    pthread_mutex_lock(&d->lock);
    while (!d->closing) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += HOUSEKEEPING_S;
        pthread_cond_timedwait(&d->wake, &d->lock, &until);
        bool due = d->tx.block_count && now_ns() - d->tx_since_ns > UNCOMMITTED_NS && !d->dead;
        pthread_mutex_unlock(&d->lock);
        if (due)
            (void)device_commit(&w, false); /* a failure is the next flush's to say */
        room_look(d);
        pthread_mutex_lock(&d->lock);
    }
    pthread_mutex_unlock(&d->lock);
    worker_free(&w);
    return NULL;
}

static void root_of(struct device *d, struct sc_root *root)
{
    *root = (struct sc_root){.sequence = d->sequence, .epoch = d->serving ? d->epoch : d->found_epoch};
    memcpy(root->chain, d->chain, CHAIN_BYTES);
}

API uint64_t sc_backing_bytes(uint64_t device_bytes)
{
    uint64_t blocks = device_bytes / BLOCK;
    return device_bytes % BLOCK || !blocks || blocks > MAX_BLOCKS ? 0 : slots_for(blocks) * BLOCK;
}

/* Makes an empty device in ``epoch``. ``fd`` stays the caller's. */
API int sc_format(int fd, const struct sc_backing *other, const uint8_t *key, const uint8_t *id, uint64_t device_bytes,
                  uint32_t epoch, struct sc_root *root)
{
    static const uint8_t zeros[BLOCK] __attribute__((aligned(BLOCK)));
    static const struct entry nothing;
    if (!sc_backing_bytes(device_bytes) || !epoch)
        return EINVAL;
    struct handle *h = make(fd, other, key, id, 0);
    if (!h)
        return ENOMEM;
    struct device *d = &h->d;
    d->blocks = device_bytes / BLOCK;
    d->epoch = d->found_epoch = epoch;
    int error = d->backing.size(d->backing.context) < sc_backing_bytes(device_bytes) ? SC_TRUNCATED : 0;
    if (!error)
        error = d->backing.write(d->backing.context, zeros, BLOCK, BLOCK);
    if (!error)
        error = super_write(&h->w, 0, 1, &nothing, d->chain);
    if (!error)
        error = d->backing.sync(d->backing.context);
    d->sequence = 1;
    root_of(d, root);
    d->fd = -1;
    destroy(h);
    return error;
}

/* Reads and judges a device; nothing is written. ``trusted->reserved``: the last promised epoch.
 * The handle has a duplicate of ``fd``. */
API int sc_prepare(int fd, const struct sc_backing *other, const uint8_t *key, const uint8_t *id,
                   const struct sc_root *trusted, uint64_t cache_pages, struct handle **out, struct sc_root *found)
{
    int own = other ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (!other && own < 0)
        return errno;
    struct handle *h = make(own, other, key, id, cache_pages);
    if (!h) {
        if (own >= 0)
            close(own);
        return ENOMEM;
    }
    pthread_mutex_lock(&h->d.lock);
    int error = recover(&h->w, trusted, found);
    pthread_mutex_unlock(&h->d.lock);
    if (error)
        destroy(h);
    else
        *out = h;
    return error;
}

/* Serve in ``epoch``, which the caller has promised to nobody else and has written down. What was
 * found is made durable first (it may be in the host's cache only), then the epoch is on the disk. */
API int sc_serve(struct handle *h, uint32_t epoch, struct sc_root *root)
{
    struct device *d = &h->d;
    if (d->serving || epoch <= d->found_epoch)
        return SC_EPOCH;
    if (d->damaged) {
        root_of(d, root);
        return 0; /* readable only */
    }
    d->epoch = epoch;
    int error = d->backing.sync(d->backing.context);
    if (!error)
        error = device_commit(&h->w, true);
    if (error)
        return error;
    d->serving = true;
    if (pthread_create(&d->housekeeper, NULL, housekeeping, h)) {
        d->serving = false;
        return EAGAIN;
    }
    root_of(d, root);
    return 0;
}

#define ONE_AT_A_TIME(call) \
    pthread_mutex_lock(&h->calls); \
    int error = (call); \
    pthread_mutex_unlock(&h->calls); \
    return error

static bool within(struct handle *h, uint64_t offset, uint64_t length)
{
    uint64_t size = h->d.blocks * BLOCK;
    return offset <= size && length <= size - offset;
}

API int sc_read(struct handle *h, uint64_t offset, uint8_t *data, uint64_t length)
{
    if (!within(h, offset, length))
        return EINVAL;
    ONE_AT_A_TIME(device_read(&h->w, offset, data, length));
}

API int sc_write(struct handle *h, uint64_t offset, const uint8_t *data, uint64_t length)
{
    if (!within(h, offset, length))
        return ENOSPC;
    ONE_AT_A_TIME(device_write(&h->w, offset, data, length));
}

API int sc_zero(struct handle *h, uint64_t offset, uint64_t length)
{
    if (!within(h, offset, length))
        return EINVAL;
    ONE_AT_A_TIME(device_zero(&h->w, offset, length, false));
}

API int sc_flush(struct handle *h, int checkpoint)
{
    if (!h->d.serving)
        return 0;
    ONE_AT_A_TIME(device_commit(&h->w, checkpoint));
}

/* Whether clients' requests that find no room on the provider's disk wait for it, or are refused. */
API int sc_hold(struct handle *h, int hold)
{
    room_hold(&h->d, hold);
    return 0;
}

/* The backing file has grown; new connections see the new size. */
API int sc_grow(struct handle *h, uint64_t device_bytes)
{
    struct device *d = &h->d;
    uint64_t blocks = device_bytes / BLOCK, needed = sc_backing_bytes(device_bytes);
    if (!d->serving || !needed || blocks < d->blocks)
        return EINVAL;
    if (d->backing.size(d->backing.context) < needed)
        return SC_TRUNCATED;
    pthread_mutex_lock(&d->commit_lock);
    pthread_mutex_lock(&d->lock);
    int error = slots_resize(d, blocks);
    if (!error) {
        d->blocks = blocks;
        d->grown = true;
    }
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_unlock(&d->commit_lock);
    return error ? error : sc_flush(h, 1);
}

API void sc_state(struct handle *h, struct sc_state *s)
{
    struct device *d = &h->d;
    memset(s, 0, sizeof *s);
    pthread_mutex_lock(&d->lock);
    root_of(d, &s->root);
    s->blocks = d->blocks, s->slots = d->slots_end - FIRST_SLOT, s->free_slots = d->free_slots;
    s->cached_pages = d->page_count, s->dirty_pages = d->dirty_count, s->uncommitted = d->tx.block_count;
    s->reads = d->reads, s->read_bytes = d->read_bytes, s->read_ns = d->read_ns;
    s->writes = d->writes, s->write_bytes = d->write_bytes, s->write_ns = d->write_ns;
    s->flushes = d->flushes, s->zeroed_bytes = d->zeroed_bytes;
    s->commits = d->commits, s->checkpoints = d->checkpoints, s->failed_requests = d->failed_requests;
    s->connections = d->connection_count, s->dead = d->dead, s->damaged = d->damaged, s->full = d->full;
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_lock(&d->evidence_lock);
    s->evidence = d->refused;
    pthread_mutex_unlock(&d->evidence_lock);
}

/* The next piece of evidence; 0 when there is none. */
API int sc_evidence(struct handle *h, struct sc_evidence *out)
{
    struct device *d = &h->d;
    pthread_mutex_lock(&d->evidence_lock);
    int have = d->evidence_read < d->evidence_count;
    if (have)
        *out = d->ring[d->evidence_read++ % EVIDENCE_RING];
    pthread_mutex_unlock(&d->evidence_lock);
    return have;
}

API int sc_event_fd(struct handle *h)
{
    return h->d.event_fd;
}

/* Ends all connections, commits, and lets go. The error of the last commit, if it failed. */
API int sc_close(struct handle *h, int commit, struct sc_root *root)
{
    struct device *d = &h->d;
    int error = 0;
    connections_close(d);
    if (d->serving) {
        pthread_mutex_lock(&d->lock);
        d->closing = true;
        pthread_cond_broadcast(&d->wake);
        pthread_mutex_unlock(&d->lock);
        pthread_join(d->housekeeper, NULL);
        if (commit && (error = device_commit(&h->w, true)) && !d->dead)
            error = device_commit(&h->w, false); /* a record may find the room that a tree does not */
    }
    root_of(d, root);
    destroy(h);
    return error;
}
