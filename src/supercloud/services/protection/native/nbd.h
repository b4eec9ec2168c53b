/* What the two halves of the NBD server share. */
#ifndef SUPERCLOUD_NBD_H
#define SUPERCLOUD_NBD_H

#include "engine.h"

#define THREADS 6u /* of one connection */
#define MAX_REQUEST_BYTES (32u << 20)
#define READ_AHEAD_BYTES (64u << 10)
#define CONTEXT "base:allocation"
#define CONTEXT_ID 1u

struct connection {
    struct device *device;
    struct connection *next;
    int socket;
    pthread_t threads[THREADS];
    unsigned thread_count, running;
    pthread_mutex_t receiving, sending;
    bool structured, status, over;
    uint64_t size; /* as it was announced: more than there is, when it may grow into that */
    uint16_t flags;
    uint8_t *ahead;
    size_t ahead_at, ahead_end;
};


bool nbd_send(struct connection *, const void *head, size_t head_length, const void *data, size_t length);
bool nbd_receive(struct connection *, void *data, size_t length);
void nbd_put(uint8_t **at, unsigned bytes, uint64_t value);
uint64_t nbd_get(const uint8_t *at, unsigned bytes);
bool nbd_negotiate(struct connection *);
bool room_wait(struct connection *, int error);

#endif
