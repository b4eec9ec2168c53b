/* AES-256-GCM through OpenSSL's EVP, one context a thread and direction, keyed once. */
#include "engine.h"

#include <openssl/crypto.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NONCE_BYTES 12

void wipe(void *data, size_t length)
{
    OPENSSL_cleanse(data, length);
}

void *aligned(size_t bytes)
{
    void *memory = NULL;
    return posix_memalign(&memory, BLOCK, bytes) == 0 ? memory : NULL;
}

int worker_make(struct worker *w, struct device *d)
{
    memset(w, 0, sizeof *w);
    w->device = d;
    w->sealing = EVP_CIPHER_CTX_new();
    w->opening = EVP_CIPHER_CTX_new();
    w->plain = aligned(CHUNK_BYTES);
    w->scratch = aligned(CHUNK_BYTES);
    if (w->sealing && w->opening && w->plain && w->scratch &&
        EVP_EncryptInit_ex(w->sealing, EVP_aes_256_gcm(), NULL, d->key, NULL) == 1 &&
        EVP_DecryptInit_ex(w->opening, EVP_aes_256_gcm(), NULL, d->key, NULL) == 1)
        return 0;
    worker_free(w);
    return ENOMEM;
}

void worker_free(struct worker *w)
{
    EVP_CIPHER_CTX_free(w->sealing); /* wipes the key schedule */
    EVP_CIPHER_CTX_free(w->opening);
    if (w->plain)
        wipe(w->plain, CHUNK_BYTES);
    if (w->scratch)
        wipe(w->scratch, CHUNK_BYTES);
    free(w->plain);
    free(w->scratch);
    memset(w, 0, sizeof *w);
}

struct binding bind_to(const struct device *d, uint32_t kind, uint64_t index)
{
    struct binding b = {.kind = kind, .index = index};
    memcpy(b.id, d->id, ID_BYTES);
    return b;
}

static void nonce_of(const struct entry *e, uint8_t nonce[NONCE_BYTES])
{
    memcpy(nonce, &e->epoch, 4);
    memcpy(nonce + 4, &e->counter, 8);
}

/* Sets the entry's epoch, counter and tag; no two calls under one key ever use the same nonce:
 * the epoch was promised for this opening alone, and the counter is taken once. */
int seal(struct worker *w, const struct binding *b, struct entry *e, const uint8_t *plain, size_t length,
         uint8_t *sealed)
{
    uint8_t nonce[NONCE_BYTES];
    int done;
    e->epoch = w->device->epoch;
    e->counter = atomic_fetch_add(&w->device->counter, 1);
    nonce_of(e, nonce);
    if (EVP_EncryptInit_ex(w->sealing, NULL, NULL, NULL, nonce) != 1 ||
        EVP_EncryptUpdate(w->sealing, NULL, &done, (const uint8_t *)b, sizeof *b) != 1 ||
        EVP_EncryptUpdate(w->sealing, sealed, &done, plain, (int)length) != 1 ||
        EVP_EncryptFinal_ex(w->sealing, sealed + done, &done) != 1 ||
        EVP_CIPHER_CTX_ctrl(w->sealing, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, e->tag) != 1)
        return EIO;
    return 0;
}

/* On failure nothing of the plaintext stays in ``plain``. */
bool unseal(struct worker *w, const struct binding *b, const struct entry *e, const uint8_t *sealed, size_t length,
            uint8_t *plain)
{
    uint8_t nonce[NONCE_BYTES], tag[TAG_BYTES];
    int done;
    nonce_of(e, nonce);
    memcpy(tag, e->tag, TAG_BYTES);
    if (EVP_DecryptInit_ex(w->opening, NULL, NULL, NULL, nonce) == 1 &&
        EVP_DecryptUpdate(w->opening, NULL, &done, (const uint8_t *)b, sizeof *b) == 1 &&
        EVP_DecryptUpdate(w->opening, plain, &done, sealed, (int)length) == 1 &&
        EVP_CIPHER_CTX_ctrl(w->opening, EVP_CTRL_AEAD_SET_TAG, TAG_BYTES, tag) == 1 &&
        EVP_DecryptFinal_ex(w->opening, plain + done, &done) == 1)
        return true;
    wipe(plain, length);
    return false;
}

int chain_on(const uint8_t before[CHAIN_BYTES], const uint8_t *data, size_t length, uint8_t after[CHAIN_BYTES])
{
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    uint8_t out[CHAIN_BYTES];
    bool good = hash && EVP_DigestInit_ex(hash, EVP_sha256(), NULL) == 1 &&
                EVP_DigestUpdate(hash, before, CHAIN_BYTES) == 1 && EVP_DigestUpdate(hash, data, length) == 1 &&
                EVP_DigestFinal_ex(hash, out, NULL) == 1;
    EVP_MD_CTX_free(hash);
    if (good)
        memcpy(after, out, CHAIN_BYTES);
    return good ? 0 : ENOMEM;
}
