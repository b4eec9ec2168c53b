/* The server's side of NBD (github.com/NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle, simple
 * and structured replies, base:allocation. Several threads serve one connection: one reads the next
 * request while the others work, and each sends its own answer. */
#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define API __attribute__((visibility("default")))
#define MAX_CONNECTIONS 8u
#define MAX_REACH_BYTES (1ull << 44)
enum { CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_ZEROES, CMD_STATUS };
#define FLAG_FUA 1u
#define FLAG_REQ_ONE 8u
/* has flags, flush, fua, trim, write zeroes, multi conn */
#define FLAG_READ_ONLY 2u
#define EXPORT_FLAGS (1u | 4u | 8u | 32u | 64u | 256u)
enum { CHUNK_NONE = 0, CHUNK_DATA = 1, CHUNK_STATUS = 5, CHUNK_ERROR = 32769 };

struct request {
    uint32_t magic;
    uint16_t flags, type;
    uint64_t cookie, offset;
    uint32_t length;
} __attribute__((packed));

static uint32_t wire_error(int error)
{
    switch (error) {
    case 0: return 0;
    case EPERM: case EROFS: return 1;
    case ENOMEM: return 12;
    case EINVAL: return 22;
    case ENOSPC: case EDQUOT: return 28;
    case EOVERFLOW: return 75;
    case ENOTSUP: return 95;
    default: return 5;
    }
}

static bool reply_simple(struct connection *c, const struct request *r, int error, const void *data, size_t length)
{
    uint8_t head[16], *at = head;
    nbd_put(&at, 4, 0x67446698);
    nbd_put(&at, 4, wire_error(error));
    memcpy(at, &r->cookie, 8);
    pthread_mutex_lock(&c->sending);
    bool good = nbd_send(c, head, sizeof head, error ? NULL : data, error ? 0 : length);
    pthread_mutex_unlock(&c->sending);
    return good;
}

/* One chunk, the last of its reply; ``prefix`` goes before the data, in its length. */
static bool reply_chunk(struct connection *c, const struct request *r, unsigned type, bool last, const void *prefix,
                        size_t prefix_length, const void *data, size_t length)
{
    uint8_t head[32], *at = head;
    nbd_put(&at, 4, 0x668e33ef);
    nbd_put(&at, 2, last);
    nbd_put(&at, 2, type);
    memcpy(at, &r->cookie, 8);
    at += 8;
    nbd_put(&at, 4, prefix_length + length);
    memcpy(at, prefix, prefix_length);
    pthread_mutex_lock(&c->sending);
    bool good = nbd_send(c, head, 20 + prefix_length, data, length);
    pthread_mutex_unlock(&c->sending);
    return good;
}

static bool reply(struct connection *c, const struct request *r, int error)
{
    uint8_t body[6], *at = body;
    if (error)
        c->device->failed_requests++;
    if (!c->structured || (r->type != CMD_READ && r->type != CMD_STATUS))
        return reply_simple(c, r, error, NULL, 0);
    nbd_put(&at, 4, wire_error(error));
    nbd_put(&at, 2, 0);
    return reply_chunk(c, r, error ? CHUNK_ERROR : CHUNK_NONE, true, body, error ? 6 : 0, NULL, 0);
}

static bool serve_read_whole(struct worker *w, struct connection *c, const struct request *r)
{
    struct device *d = c->device;
    if (r->length <= CHUNK_BYTES) {
        int error = device_read(w, r->offset, w->plain, r->length);
        return error ? reply(c, r, error) : reply_simple(c, r, 0, w->plain, r->length);
    }
    pthread_mutex_lock(&d->large_lock);
    uint8_t *data = aligned(r->length);
    int error = data ? device_read(w, r->offset, data, r->length) : ENOMEM;
    bool good = error ? reply(c, r, error) : reply_simple(c, r, 0, data, r->length);
    free(data);
    pthread_mutex_unlock(&d->large_lock);
    return good;
}

static bool serve_read(struct worker *w, struct connection *c, const struct request *r)
{
    if (!c->structured)
        return serve_read_whole(w, c, r);
    for (uint32_t done = 0; done < r->length;) {
        uint32_t n = r->length - done < CHUNK_BYTES ? r->length - done : CHUNK_BYTES;
        uint8_t prefix[8], *at = prefix;
        int error = device_read(w, r->offset + done, w->plain, n);
        if (error)
            return reply(c, r, error);
        nbd_put(&at, 8, r->offset + done);
        done += n;
        if (!reply_chunk(c, r, CHUNK_DATA, done == r->length, prefix, 8, w->plain, n))
            return false;
    }
    return true;
}

/* Joined to the one before if it is of the same kind. */
static void add_extent(const uint8_t *first, uint8_t **at, uint64_t bytes, uint32_t flags)
{
    if (*at > first && nbd_get(*at - 4, 4) == flags) {
        bytes += nbd_get(*at - 8, 4); /* a request has less than 4 GiB */
        *at -= 8;
    }
    nbd_put(at, 4, bytes);
    nbd_put(at, 4, flags);
}

/* Extents of the range that are there or are holes; at most as many as fit into a small answer. */
static bool serve_status(struct worker *w, struct connection *c, const struct request *r)
{
    uint8_t extents[8 * 256], *at = extents, context[4], *to = context;
    uint64_t block = r->offset / BLOCK, left = r->length, skip = r->offset % BLOCK;
    while (left && at < extents + sizeof extents) {
        uint64_t run;
        bool mapped = device_mapped(w, block, &run, (left + skip + BLOCK - 1) / BLOCK);
        uint64_t bytes = run * BLOCK - skip < left ? run * BLOCK - skip : left;
        add_extent(extents, &at, bytes, mapped ? 0 : 3 /* a hole that reads as zeros */);
        block += run, left -= bytes, skip = 0;
        if (r->flags & FLAG_REQ_ONE && at > extents + 8)
            break;
    }
    nbd_put(&to, 4, CONTEXT_ID);
    if (r->flags & FLAG_REQ_ONE)
        at = extents + 8;
    return reply_chunk(c, r, CHUNK_STATUS, true, context, 4, extents, (size_t)(at - extents));
}

/* What finds no room is tried again for as long as it may wait; done twice is done once. */
#define WITH_ROOM(c, error, call) \
    do \
        error = (call); \
    while (room_wait(c, error))

static int serve_change(struct worker *w, struct connection *c, const struct request *r)
{
    int error = 0;
    if (r->type == CMD_ZEROES || r->type == CMD_TRIM) {
        WITH_ROOM(c, error, device_zero(w, r->offset, r->length, r->type == CMD_TRIM));
        w->device->zeroed_bytes += r->length;
    }
    if (!error && (r->type == CMD_FLUSH || r->flags & FLAG_FUA))
        WITH_ROOM(c, error, device_commit(w, false));
    return error;
}

/* A write: its data follow the request. The first pieces of a large one are written while its socket
 * is held, the last after it was given to the next reader. Returns false when the client is gone. */
static bool take_write(struct worker *w, struct connection *c, const struct request *r, int *error, uint32_t *last)
{
    uint32_t done = 0;
    while (r->length - done > CHUNK_BYTES) {
        if (!nbd_receive(c, w->plain, CHUNK_BYTES))
            return false;
        if (!*error)
            WITH_ROOM(c, *error, device_write(w, r->offset + done, w->plain, CHUNK_BYTES));
        done += CHUNK_BYTES;
    }
    *last = r->length - done;
    return nbd_receive(c, w->plain, *last);
}

static int check(const struct connection *c, const struct request *r)
{
    bool ranged = r->type != CMD_FLUSH && r->type != CMD_DISC;
    uint64_t there = c->device->blocks * BLOCK, size = c->size < there ? c->size : there;
    if (r->type > CMD_STATUS || r->type == CMD_CACHE || (r->type == CMD_STATUS && !c->status))
        return EINVAL;
    if (ranged && (r->offset > size || r->length > size - r->offset))
        return r->type == CMD_WRITE || r->type == CMD_ZEROES ? ENOSPC : EINVAL;
    if (ranged && !r->length)
        return EINVAL;
    return r->type == CMD_READ && r->length > MAX_REQUEST_BYTES ? EOVERFLOW : 0;
}

/* A write that waits until it is durable is a write and a flush. */
static void account(struct device *d, const struct request *r, uint64_t took_ns)
{
    if (r->type == CMD_FLUSH || r->flags & FLAG_FUA)
        d->flushes++;
    if (r->type == CMD_READ) {
        d->reads++;
        d->read_bytes += r->length;
        d->read_ns += took_ns;
    } else if (r->type == CMD_WRITE) {
        d->writes++;
        d->write_bytes += r->length;
        d->write_ns += took_ns;
    }
}

/* One request from the socket to its answer; false when the connection is over. The lock of the
 * receiving side is held on entry and is given up on the way. */
static bool serve_one(struct worker *w, struct connection *c)
{
    struct request r;
    uint32_t last = 0;
    bool good = nbd_receive(c, &r, sizeof r) && be32toh(r.magic) == 0x25609513;
    r.flags = be16toh(r.flags), r.type = be16toh(r.type);
    r.offset = be64toh(r.offset), r.length = be32toh(r.length);
    if (good && r.type == CMD_WRITE && r.length > MAX_REQUEST_BYTES)
        good = false; /* who sends that much knows no limits */
    if (!good || r.type == CMD_DISC) {
        c->over = true;
        pthread_mutex_unlock(&c->receiving);
        return false;
    }
    uint64_t started = now_ns();
    int error = check(c, &r);
    if (r.type == CMD_WRITE)
        good = take_write(w, c, &r, &error, &last);
    if (!good)
        c->over = true;
    pthread_mutex_unlock(&c->receiving);
    if (!good)
        return false;
    if (error) {
        good = reply(c, &r, error);
    } else if (r.type == CMD_READ) {
        good = serve_read(w, c, &r);
    } else if (r.type == CMD_STATUS) {
        good = serve_status(w, c, &r);
    } else {
        if (r.type == CMD_WRITE)
            WITH_ROOM(c, error, device_write(w, r.offset + (r.length - last), w->plain, last));
        good = reply(c, &r, error ? error : serve_change(w, c, &r));
    }
    account(c->device, &r, now_ns() - started);
    return good;
}

static void *serve(void *argument)
{
    struct connection *c = argument;
    struct worker w;
    bool good = worker_make(&w, c->device) == 0;
    while (good) {
        pthread_mutex_lock(&c->receiving);
        if (c->over) {
            pthread_mutex_unlock(&c->receiving);
            break;
        }
        good = serve_one(&w, c);
    }
    shutdown(c->socket, SHUT_RDWR); /* the others end too */
    worker_free(&w);
    pthread_mutex_lock(&c->device->lock);
    c->running--;
    pthread_cond_broadcast(&c->device->loaded);
    pthread_mutex_unlock(&c->device->lock);
    return NULL;
}

/* Negotiates, then serves with the other threads; the last thing is to take the connection away. */
static void *begin(void *argument)
{
    struct connection *c = argument;
    struct device *d = c->device;
    if (nbd_negotiate(c)) {
        pthread_mutex_lock(&d->lock);
        while (c->thread_count < THREADS) {
            if (pthread_create(&c->threads[c->thread_count], NULL, serve, c))
                break;
            c->thread_count++, c->running++;
        }
        while (c->running)
            pthread_cond_wait(&d->loaded, &d->lock);
        pthread_mutex_unlock(&d->lock);
    }
    shutdown(c->socket, SHUT_RDWR);
    for (unsigned i = 0; i < c->thread_count; i++)
        pthread_join(c->threads[i], NULL);
    pthread_mutex_lock(&d->lock);
    struct connection **at = &d->connections;
    while (*at != c)
        at = &(*at)->next;
    *at = c->next;
    close(c->socket);
    wipe(c->ahead, READ_AHEAD_BYTES);
    free(c->ahead);
    free(c);
    d->connection_count--; /* connections_close waits for it, and frees all after it */
    pthread_cond_broadcast(&d->loaded);
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

/* Serves a connected stream socket, which is the engine's from then on (also on an error). NBD tells
 * a client the size once, and has no word for its change; so one that is to see the device grow is
 * announced ``reach`` bytes, of which those behind the device's end are errors until it has grown. */
API int sc_connect(struct device *d, int fd, uint64_t reach)
{
    struct connection *c = calloc(1, sizeof *c);
    pthread_t thread;
    int error = c && (c->ahead = aligned(READ_AHEAD_BYTES)) ? 0 : ENOMEM;
    pthread_mutex_lock(&d->lock);
    if (!error && (reach % BLOCK || reach > MAX_REACH_BYTES))
        error = EINVAL;
    if (!error && d->closing)
        error = SC_CLOSED;
    if (!error && d->connection_count >= MAX_CONNECTIONS)
        error = EBUSY;
    if (!error) {
        uint64_t there = d->blocks * BLOCK;
        c->device = d, c->socket = fd, c->size = reach > there ? reach : there;
        c->flags = (uint16_t)(EXPORT_FLAGS | (d->serving ? 0 : FLAG_READ_ONLY));
        pthread_mutex_init(&c->receiving, NULL);
        pthread_mutex_init(&c->sending, NULL);
        error = pthread_create(&thread, NULL, begin, c);
    }
    if (error) {
        close(fd);
        if (c)
            free(c->ahead);
        free(c);
    } else {
        pthread_detach(thread);
        c->next = d->connections;
        d->connections = c;
        d->connection_count++;
    }
    pthread_mutex_unlock(&d->lock);
    return error;
}

void connections_close(struct device *d)
{
    pthread_mutex_lock(&d->lock);
    d->closing = true;
    for (struct connection *c = d->connections; c; c = c->next)
        shutdown(c->socket, SHUT_RDWR);
    pthread_cond_broadcast(&d->room);
    while (d->connection_count)
        pthread_cond_wait(&d->loaded, &d->lock);
    pthread_mutex_unlock(&d->lock);
}
