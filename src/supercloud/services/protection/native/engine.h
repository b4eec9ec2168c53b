/* The data protection engine: what its files share. The format is told in docs/decisions/0006 and
 * in format.py; this is the one writer of it. Everything read from the backing file or from a
 * client is hostile until it is authenticated or bounded. */
#ifndef SUPERCLOUD_ENGINE_H
#define SUPERCLOUD_ENGINE_H

#include <openssl/evp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is written as it lies in memory");

#define BLOCK 4096u
#define FANOUT 128u
#define LEVELS 5u /* of tree pages above the blocks; 128^5 blocks are more than MAX_BLOCKS */
#define KEY_BYTES 32u
#define ID_BYTES 16u
#define TAG_BYTES 16u
#define CHAIN_BYTES 32u
#define KEPT_BYTES 28u /* of the chain, in the root that the user keeps; its epoch is beside it */
#define JOURNAL_AT 2u       /* in units of BLOCK, after two superblocks */
#define JOURNAL_BLOCKS 2048u
#define FIRST_SLOT (JOURNAL_AT + JOURNAL_BLOCKS)
#define MAX_BLOCKS (1ull << 31)
#define CHUNK_BLOCKS 256u /* what one worker handles at once: 1 MiB */
#define CHUNK_BYTES (CHUNK_BLOCKS * BLOCK)
#define BUCKETS 16384u /* of cached pages */
#define TX_BLOCKS 32768u  /* a writer commits when so many blocks changed since the last commit */

/* Answers beyond errno. The binding has the same table. */
enum {
    SC_ROLLED_BACK = 1001, /* older than the trusted root */
    SC_FORKED = 1002,      /* another history than the trusted root's */
    SC_NOT_A_DEVICE = 1003, /* no superblock that the key opens */
    SC_TRUNCATED = 1004,
    SC_EPOCH = 1005, /* an epoch that was not promised, or that was used before */
    SC_CLOSED = 1006,
};

/* Where a block or a tree page lies and what it must be. Slot 0: nowhere, it reads as zeros. */
struct entry {
    uint32_t slot;
    uint32_t epoch;
    uint64_t counter;
    uint8_t tag[TAG_BYTES];
};
_Static_assert(sizeof(struct entry) * FANOUT == BLOCK, "a page is full of entries");

struct sc_root {
    uint64_t sequence;
    uint32_t epoch;
    uint32_t reserved;
    uint8_t chain[CHAIN_BYTES];
};

/* The backing file; a test gives functions of its own. All return 0 or an errno. */
struct sc_backing {
    int (*read)(void *context, void *data, size_t length, uint64_t offset);
    int (*write)(void *context, const void *data, size_t length, uint64_t offset);
    int (*sync)(void *context);
    uint64_t (*size)(void *context);
    void *context;
};

enum { EVIDENCE_BLOCK = 1, EVIDENCE_PAGE, EVIDENCE_DEAD, EVIDENCE_SPACE, EVIDENCE_DISCARDED, EVIDENCE_ROOM };

struct sc_evidence {
    uint32_t kind, level;
    uint64_t index;
    uint32_t slot, epoch;
    uint64_t counter, sequence;
};
#define EVIDENCE_RING 64u

struct sc_state {
    struct sc_root root;
    uint64_t blocks, slots, free_slots, cached_pages, dirty_pages, uncommitted;
    uint64_t reads, read_bytes, read_ns, writes, write_bytes, write_ns, flushes;
    uint64_t zeroed_bytes, commits, checkpoints, evidence, connections, failed_requests;
    uint32_t dead, damaged, full;
};

enum page_state { PAGE_LOADING, PAGE_READY, PAGE_FAILED };

struct page {
    struct entry *entries; /* FANOUT, aligned to BLOCK */
    struct page *next;     /* in its bucket */
    uint64_t index;
    uint64_t in_tx[FANOUT / 64]; /* which entries the open transaction changed */
    uint32_t home;               /* slot of the last checkpoint's copy, 0: none */
    uint32_t refs;
    uint8_t level, state;
    bool dirty, writing, used;
};

/* What changed since the last commit: blocks, and the slots that it sets free once durable. */
struct tx {
    uint32_t *blocks, *freed;
    size_t block_count, freed_count, block_room, freed_room;
};

struct connection;

struct device {
    pthread_mutex_t lock;        /* everything below, for moments */
    pthread_mutex_t commit_lock; /* one commit at a time; taken before lock */
    pthread_mutex_t large_lock;  /* one reply larger than a chunk at a time */
    pthread_cond_t loaded;       /* a page came, or a connection went */
    pthread_cond_t wake;         /* of the housekeeper */
    pthread_cond_t room;         /* nobody is to wait for room any more */
    struct sc_backing backing;
    int fd, event_fd;
    uint8_t key[KEY_BYTES], id[ID_BYTES];
    uint32_t epoch, found_epoch;
    _Atomic uint64_t counter; /* nonces of this epoch */
    _Atomic uint64_t blocks; /* changed under both locks: a device may grow under its users */
    uint64_t slots_end;
    /* slots.c */
    uint64_t *used;
    uint64_t free_slots, reserve, hint, page_hint;
    /* pages.c */
    struct page **buckets, **pages;
    size_t page_count, page_room, hand, dirty_count, page_limit;
    struct entry root;
    /* commit.c */
    struct tx tx;
    uint64_t tx_number, durable_tx, tx_since_ns;
    _Atomic uint64_t sequence;
    uint8_t chain[CHAIN_BYTES];
    uint32_t journal_at; /* next record, in blocks from the journal's start */
    unsigned super;      /* which superblock is the newest */
    uint8_t *record;
    size_t record_room;
    bool serving, closing, damaged;
    bool grown; /* no superblock has the new size yet: the next commit is one */
    atomic_bool dead;
    /* room.c */
    bool holding;
    atomic_bool full;
    _Atomic uint64_t full_ns; /* when there was no room the last time */
    pthread_t housekeeper;
    /* nbd.c */
    struct connection *connections;
    unsigned connection_count;
    /* for the user */
    pthread_mutex_t evidence_lock; /* innermost */
    struct sc_evidence ring[EVIDENCE_RING];
    uint64_t evidence_count, evidence_read, refused; /* refused: blocks and pages that were not authentic */
    _Atomic uint64_t reads, read_bytes, read_ns, writes, write_bytes, write_ns, flushes;
    _Atomic uint64_t zeroed_bytes, commits, checkpoints, failed_requests;
};

/* One thread's tools: nothing of it is shared. */
struct worker {
    struct device *device;
    EVP_CIPHER_CTX *sealing, *opening;
    uint8_t *plain, *scratch; /* CHUNK_BYTES, aligned */
    struct entry entries[CHUNK_BLOCKS];
    uint32_t slots[CHUNK_BLOCKS];
};

/* What is bound into every sealed thing beside its nonce. */
struct binding {
    uint8_t id[ID_BYTES];
    uint32_t kind, count; /* kind: level 0..LEVELS, or one of these */
    uint64_t index;
    uint8_t chain[CHAIN_BYTES]; /* of records only; else zeros */
};
#define KIND_RECORD 0x80u
#define KIND_SUPER 0x81u

/* crypto.c */
int worker_make(struct worker *, struct device *);
void worker_free(struct worker *);
int seal(struct worker *, const struct binding *, struct entry *, const uint8_t *plain, size_t, uint8_t *sealed);
bool unseal(struct worker *, const struct binding *, const struct entry *, const uint8_t *sealed, size_t, uint8_t *plain);
struct binding bind_to(const struct device *, uint32_t kind, uint64_t index);
int chain_on(const uint8_t before[CHAIN_BYTES], const uint8_t *data, size_t length, uint8_t after[CHAIN_BYTES]);
void wipe(void *, size_t);
void *aligned(size_t bytes);

/* slots.c; the lock is held */
uint64_t tree_pages(uint64_t blocks);
uint64_t slots_for(uint64_t blocks);
int slots_resize(struct device *, uint64_t blocks);
bool slot_mark(struct device *, uint32_t slot);
void slot_free(struct device *, uint32_t slot);
size_t slots_take(struct device *, uint64_t block, size_t count, uint32_t *slots);
int slot_take_for_page(struct device *, uint32_t *slot);

/* pages.c; the lock is held, and given up while a page is read */
int page_get(struct worker *, unsigned level, uint64_t index, struct page **);
struct page *page_cached(struct device *, unsigned level, uint64_t index);
void page_put(struct device *, struct page *);
void page_dirty(struct device *, struct page *);
void pages_free(struct device *);

/* device.c */
int device_read(struct worker *, uint64_t offset, uint8_t *data, size_t length);
int device_write(struct worker *, uint64_t offset, const uint8_t *data, size_t length);
int device_zero(struct worker *, uint64_t offset, uint64_t length, bool whole_blocks_only);
int install(struct worker *, uint64_t block, size_t count, const struct entry *, const struct entry *expected);
bool device_mapped(struct worker *, uint64_t block, uint64_t *run, uint64_t most);
uint64_t now_ns(void);

/* commit.c */
int tx_reserve(struct tx *, size_t more);
void tx_free(struct tx *);
int device_commit(struct worker *, bool checkpoint);
int device_commit_number(struct worker *, uint64_t number, bool checkpoint);

/* checkpoint.c */
struct touched {
    struct page *page;
    struct entry entry;
};
struct checkpoint {
    struct touched *pages; /* of all levels, the leaves first */
    size_t count, room, leaves;
    uint8_t *images; /* of the leaves, as they were at the moment of the commit */
};
int checkpoint_begin(struct device *, struct checkpoint *);
int checkpoint_write(struct worker *, struct checkpoint *);
void checkpoint_end(struct device *, struct checkpoint *, bool done);

/* recover.c */
struct super_body {
    uint64_t sequence, blocks;
    struct entry root;
    uint8_t chain_before[CHAIN_BYTES];
};
struct super {
    uint8_t magic[8];
    uint64_t counter;
    uint32_t epoch, version;
    uint8_t tag[TAG_BYTES], reserved[24];
    uint8_t body[BLOCK - 64];
};
_Static_assert(sizeof(struct super) == BLOCK, "a superblock is a block");
struct record {
    uint8_t magic[8];
    uint64_t sequence, counter;
    uint32_t epoch, count;
    uint8_t tag[TAG_BYTES], reserved[16];
    uint8_t body[];
};
_Static_assert(sizeof(struct record) == 64, "no padding");
struct change {
    uint32_t block, slot, epoch, reserved;
    uint64_t counter;
    uint8_t tag[TAG_BYTES];
};
_Static_assert(sizeof(struct change) == 40, "no padding");
extern const uint8_t SUPER_MAGIC[8], RECORD_MAGIC[8];
#define VERSION 1u
#define RECORD_ROOM ((JOURNAL_BLOCKS * (size_t)BLOCK - sizeof(struct record)) / sizeof(struct change))
size_t record_blocks(uint64_t count);
int super_write(struct worker *, unsigned which, uint64_t sequence, const struct entry *root,
                uint8_t chain[CHAIN_BYTES]);
int recover(struct worker *, const struct sc_root *trusted, struct sc_root *found);

/* nbd.c */
void connections_close(struct device *);

/* room.c */
void room_note(struct device *, int error);
void room_look(struct device *);
void room_hold(struct device *, bool hold);

/* device.c: tell the user */
void evidence(struct device *, uint32_t kind, unsigned level, uint64_t index, const struct entry *);

#endif
