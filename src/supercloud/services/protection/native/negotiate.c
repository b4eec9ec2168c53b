/* The first half of NBD: fixed newstyle negotiation, and how bytes come and go. */
#include "nbd.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define MAX_OPTIONS 64u
#define MAX_OPTION_BYTES 4096u
enum { OPT_EXPORT_NAME = 1, OPT_ABORT = 2, OPT_LIST = 3, OPT_INFO = 6, OPT_GO = 7, OPT_STRUCTURED = 8,
       OPT_LIST_META = 9, OPT_SET_META = 10 };
#define REP_ACK 1u
#define REP_SERVER 2u
#define REP_INFO 3u
#define REP_META 4u
#define REP_UNSUPPORTED 0x80000001u
#define REP_INVALID 0x80000003u
#define REP_UNKNOWN 0x80000006u

bool nbd_send(struct connection *c, const void *head, size_t head_length, const void *data, size_t length)
{
    struct iovec parts[2] = {{(void *)head, head_length}, {(void *)data, length}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    while (parts[0].iov_len || parts[1].iov_len) {
        ssize_t n = sendmsg(c->socket, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        for (struct iovec *p = parts; p < parts + 2; p++) {
            size_t gone = (size_t)n < p->iov_len ? (size_t)n : p->iov_len;
            p->iov_base = (uint8_t *)p->iov_base + gone;
            p->iov_len -= gone;
            n -= (ssize_t)gone;
        }
    }
    return true;
}

bool nbd_receive(struct connection *c, void *data, size_t length)
{
    uint8_t *to = data;
    while (length) {
        if (c->ahead_at < c->ahead_end) {
            size_t have = c->ahead_end - c->ahead_at, n = have < length ? have : length;
            memcpy(to, c->ahead + c->ahead_at, n);
            c->ahead_at += n, to += n, length -= n;
            continue;
        }
        bool direct = length >= READ_AHEAD_BYTES;
        ssize_t n = recv(c->socket, direct ? to : c->ahead, direct ? length : READ_AHEAD_BYTES, 0);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        if (direct)
            to += n, length -= (size_t)n;
        else
            c->ahead_at = 0, c->ahead_end = (size_t)n;
    }
    return true;
}

void nbd_put(uint8_t **at, unsigned bytes, uint64_t value)
{
    for (unsigned i = bytes; i--;)
        *(*at)++ = (uint8_t)(value >> (8 * i));
}

uint64_t nbd_get(const uint8_t *at, unsigned bytes)
{
    uint64_t value = 0;
    while (bytes--)
        value = value << 8 | *at++;
    return value;
}

static bool answer_option(struct connection *c, uint32_t option, uint32_t type, const void *data, size_t length)
{
    uint8_t head[20], *at = head;
    nbd_put(&at, 8, 0x3e889045565a9ull);
    nbd_put(&at, 4, option);
    nbd_put(&at, 4, type);
    nbd_put(&at, 4, length);
    return nbd_send(c, head, sizeof head, data, length);
}

static bool say_export(struct connection *c, uint32_t option)
{
    uint8_t info[14], *at = info;
    nbd_put(&at, 2, 0); /* NBD_INFO_EXPORT */
    nbd_put(&at, 8, c->size);
    nbd_put(&at, 2, c->flags);
    if (!answer_option(c, option, REP_INFO, info, 12))
        return false;
    at = info;
    nbd_put(&at, 2, 3); /* NBD_INFO_BLOCK_SIZE: any is served, whole blocks best */
    nbd_put(&at, 4, 1);
    nbd_put(&at, 4, BLOCK);
    nbd_put(&at, 4, MAX_REQUEST_BYTES);
    return answer_option(c, option, REP_INFO, info, 14) && answer_option(c, option, REP_ACK, NULL, 0);
}

/* NAME QUERIES: a length and a name, a count, and per query a length and a text. True in ``wanted``
 * when base:allocation is among them (or nothing is, when listing). False: malformed. */
static bool parse_contexts(const uint8_t *data, size_t length, bool listing, bool *wanted)
{
    if (length < 8 || nbd_get(data, 4) > length - 8)
        return false;
    size_t at = 4 + (size_t)nbd_get(data, 4);
    uint64_t count = nbd_get(data + at, 4);
    at += 4;
    *wanted = listing && count == 0;
    while (count--) {
        if (length - at < 4 || nbd_get(data + at, 4) > length - at - 4)
            return false;
        size_t size = (size_t)nbd_get(data + at, 4);
        const uint8_t *text = data + at + 4;
        at += 4 + size;
        if ((size == sizeof CONTEXT - 1 && !memcmp(text, CONTEXT, size)) ||
            (listing && size == 5 && !memcmp(text, "base:", 5)))
            *wanted = true;
    }
    return at == length;
}

static bool negotiate_context(struct connection *c, uint32_t option, const uint8_t *data, size_t length)
{
    uint8_t body[4 + sizeof CONTEXT - 1], *at = body;
    bool wanted = false, listing = option == OPT_LIST_META;
    if (!c->structured || !parse_contexts(data, length, listing, &wanted))
        return answer_option(c, option, REP_INVALID, NULL, 0);
    if (!listing)
        c->status = wanted;
    nbd_put(&at, 4, listing ? 0 : CONTEXT_ID);
    memcpy(at, CONTEXT, sizeof CONTEXT - 1);
    return (!wanted || answer_option(c, option, REP_META, body, sizeof body)) &&
           answer_option(c, option, REP_ACK, NULL, 0);
}

static bool say_old_export(struct connection *c, bool no_zeroes)
{
    uint8_t answer[134] = {0}, *at = answer;
    nbd_put(&at, 8, c->size);
    nbd_put(&at, 2, c->flags);
    return nbd_send(c, answer, no_zeroes ? 10 : sizeof answer, NULL, 0);
}

/* True when the transmission phase begins. There is one export; what its client calls it is no matter. */
bool nbd_negotiate(struct connection *c)
{
    static const uint8_t hello[18] = {'N', 'B', 'D', 'M', 'A', 'G', 'I', 'C', 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 3};
    uint8_t head[16], data[MAX_OPTION_BYTES];
    if (!nbd_send(c, hello, sizeof hello, NULL, 0) || !nbd_receive(c, head, 4))
        return false;
    uint64_t client = nbd_get(head, 4);
    for (unsigned count = 0; (client & ~3ull) == 0 && (client & 1) && count < MAX_OPTIONS; count++) {
        if (!nbd_receive(c, head, 16) || nbd_get(head, 8) != 0x49484156454f5054ull)
            return false;
        uint32_t option = (uint32_t)nbd_get(head + 8, 4);
        size_t length = (size_t)nbd_get(head + 12, 4);
        bool good = length <= sizeof data && nbd_receive(c, data, length);
        if (!good)
            return false;
        switch (option) {
        case OPT_EXPORT_NAME:
            return say_old_export(c, client & 2);
        case OPT_ABORT:
            answer_option(c, option, REP_ACK, NULL, 0);
            return false;
        case OPT_LIST:
            good = length ? answer_option(c, option, REP_INVALID, NULL, 0)
                          : answer_option(c, option, REP_SERVER, "\0\0\0", 4) &&
                                answer_option(c, option, REP_ACK, NULL, 0);
            break;
        case OPT_INFO:
        case OPT_GO: /* a name, and a list of information wanted: all is told anyway */
            if (length < 6 || nbd_get(data, 4) > length - 6 ||
                nbd_get(data + 4 + nbd_get(data, 4), 2) * 2 != length - 6 - nbd_get(data, 4)) {
                good = answer_option(c, option, REP_INVALID, NULL, 0);
                break;
            }
            good = say_export(c, option);
            if (good && option == OPT_GO)
                return true;
            break;
        case OPT_STRUCTURED:
            c->structured = length == 0;
            good = answer_option(c, option, length ? REP_INVALID : REP_ACK, NULL, 0);
            break;
        case OPT_LIST_META:
        case OPT_SET_META:
            good = negotiate_context(c, option, data, length);
            break;
        default:
            good = answer_option(c, option, REP_UNSUPPORTED, NULL, 0);
        }
        if (!good)
            return false;
    }
    return false;
}
