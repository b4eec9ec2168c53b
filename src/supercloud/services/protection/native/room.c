/* A provider's disk that is full. It is told of once, and once when nothing waits any more; and where
 * that is wanted, a client's request that found no room waits, and is tried again. */
#define _GNU_SOURCE
#include "nbd.h"

#include <errno.h>
#include <poll.h>
#include <time.h>

#define RETRY_NS 200000000ull
#define OVER_NS 2000000000ull /* what waits is tried more often: without a failure it is over */

static bool no_room(int error)
{
    return error == ENOSPC || error == EDQUOT;
}

/* What a write or a commit came to. A dead device's error is another matter. */
void room_note(struct device *d, int error)
{
    if (!no_room(error) || d->dead)
        return;
    d->full_ns = now_ns();
    if (!atomic_exchange(&d->full, true))
        evidence(d, EVIDENCE_SPACE, 0, 0, NULL);
}

/* Now and then: is it over? */
void room_look(struct device *d)
{
    uint64_t last = d->full_ns;
    if (d->full && now_ns() - last > OVER_NS && atomic_exchange(&d->full, false))
        evidence(d, EVIDENCE_ROOM, 0, 0, NULL);
}

/* From now on requests wait for room, or are refused again, those first that wait. */
void room_hold(struct device *d, bool hold)
{
    pthread_mutex_lock(&d->lock);
    d->holding = hold;
    pthread_cond_broadcast(&d->room);
    pthread_mutex_unlock(&d->lock);
}

/* True, a moment later, when a request that came to ``error`` is to be tried again: it found no room,
 * its client is there, and nobody wants an end. No lock is held, so that all else goes on. */
bool room_wait(struct connection *c, int error)
{
    struct device *d = c->device;
    struct pollfd client = {.fd = c->socket, .events = POLLRDHUP};
    if (!no_room(error))
        return false;
    uint64_t until = now_ns() + RETRY_NS;
    struct timespec at = {.tv_sec = (time_t)(until / 1000000000ull), .tv_nsec = (long)(until % 1000000000ull)};
    int waited = 0;
    pthread_mutex_lock(&d->lock);
    while (d->holding && !d->closing && waited != ETIMEDOUT)
        waited = pthread_cond_clockwait(&d->room, &d->lock, CLOCK_MONOTONIC, &at);
    bool again = d->holding && !d->closing;
    pthread_mutex_unlock(&d->lock);
    return again && poll(&client, 1, 0) <= 0;
}
