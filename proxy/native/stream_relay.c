/* Token events from a decoder's socket to a client's, without Python: the steady part of a streamed answer.
 *
 * One thread, one epoll. A stream is lent to it between two events and passed on chunk by chunk (RFC 9112 section 7.1)
 * for as long as each chunk ends as a token event of this stream ends: nothing else is read out of it, so nothing else
 * is passed on. Whatever comes that is not so (the last event, a usage, an error, bad framing, the end of the
 * connection, a client that takes no more) goes back to Python with all bytes that were not passed on, and Python
 * judges it. The caller's sockets are duplicated: a descriptor that is closed and given to another connection can never
 * get a byte of this one.
 *
 * relay_lend, relay_take and relay_returned are called by one thread (Python's); see proxy/relay_thread.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "framing.h"
#include "kept.h"

enum {
    READ_BYTES = 1 << 16,     /* of one recv, and the most of a chunk that is waited for */
    MAX_TAIL_BYTES = 256,     /* as proxy/client_stream.py has it */
    MAX_ID_BYTES = 256,
    MAX_EVENTS = 256,
    STREAMS_A_BLOCK = 256,
    MAX_BLOCKS = 4096,
    BUSY_EVENTS = 4,          /* in one wait: more come while these are passed on */
};

struct bytes {
    char *at;
    uint64_t size;
};

/* What Python sees of a stream, as ctypes has it in proxy/relay_thread.py. The numbers may be read at any time, the
 * bytes only after relay_take. */
struct shown {
    uint64_t num_chunks; /* passed on */
    uint64_t num_reads;
    struct block *kept;  /* what was passed on, as it came */
    struct bytes unsent; /* the end of it, which the client did not take yet, as it is to be sent */
    struct bytes rest;   /* what came and was not passed on */
    uint64_t forgot;     /* there was more to be kept than there is room for: `kept` is empty */
    uint64_t key;        /* the caller's */
};

enum state { FREE, LENT, RETURNED };

struct stream {
    struct shown shown;
    pthread_mutex_t lock; /* of all below; the numbers above are the thread's */
    enum state state;
    uint32_t index, generation;
    int from, to;
    uint64_t room; /* bytes that may be kept yet */
    struct block *last_kept;
    char tail[MAX_TAIL_BYTES], old_id[MAX_ID_BYTES], new_id[MAX_ID_BYTES];
    uint32_t tail_size, id_size;
    struct stream *next; /* free, or returned */
};

struct relay {
    int poller, wake, told; /* `wake` ends the thread, `told` says that streams came back */
    uint64_t nap_ns;
    pthread_t thread;
    pthread_mutex_t returned_lock;
    struct stream *returned, **returned_end;
    struct stream *free;
    struct stream *blocks[MAX_BLOCKS];
    uint32_t num_blocks;
    char buffer[READ_BYTES];
};

static const uint64_t WAKE = UINT64_MAX;

/* --- bytes */

/* Without memory for what can't be lost, both ends learn that the stream is over. */
static void save(struct stream *stream, struct bytes *some, const char *from, uint64_t size)
{
    if (!(some->at = malloc(size))) {
        shutdown(stream->from, SHUT_RDWR);
        shutdown(stream->to, SHUT_RDWR);
        return;
    }
    some->size = size;
    memcpy(some->at, from, size);
}

static void drop(struct bytes *some)
{
    if (!some->at) return;
    free(some->at);
    some->at = 0;
    some->size = 0;
}

static void keep_passed(struct stream *stream, const char *data, uint64_t size)
{
    struct shown *shown = &stream->shown;
    if (shown->forgot) return;
    if (size <= stream->room && !keep(&shown->kept, &stream->last_kept, data, size)) {
        stream->room -= size;
        return;
    }
    relay_forget(shown->kept);
    shown->kept = 0;
    shown->forgot = 1;
}

/* --- what is passed on */

static void rename_ids(struct stream *stream, char *data, uint64_t size)
{
    if (!stream->id_size) return;
    char *end = data + size;
    while ((data = memmem(data, end - data, stream->old_id, stream->id_size))) {
        memcpy(data, stream->new_id, stream->id_size);
        data += stream->id_size;
    }
}

/* --- the thread's side of a stream */

static void give_back(struct relay *relay, struct stream *stream)
{
    epoll_ctl(relay->poller, EPOLL_CTL_DEL, stream->from, 0);
    stream->state = RETURNED;
    stream->next = 0;
    pthread_mutex_lock(&relay->returned_lock);
    int first = !relay->returned;
    *relay->returned_end = stream;
    relay->returned_end = &stream->next;
    pthread_mutex_unlock(&relay->returned_lock);
    if (first) eventfd_write(relay->told, 1);
}

/* Pass on whole token events at the head of `data`. Returns how many bytes they are; `*judge` if what follows them, or
 * a client that takes no more, is for Python. */
static uint64_t pass_on(struct stream *stream, char *data, uint64_t size, int *judge)
{
    uint64_t passed = 0, num_chunks = 0;
    int64_t whole;
    while ((whole = whole_chunk(data + passed, size - passed, READ_BYTES / 2)) > 0) {
        char *end = data + passed + whole;
        if (whole < (int64_t)stream->tail_size || memcmp(end - stream->tail_size, stream->tail, stream->tail_size)) {
            whole = -1;
            break;
        }
        passed += whole;
        num_chunks++;
    }
    if (whole < 0) *judge = 1;
    if (!passed) return 0;
    keep_passed(stream, data, passed);
    rename_ids(stream, data, passed);
    ssize_t sent = send(stream->to, data, passed, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) sent = 0; /* a client that is gone is told of by its own connection */
    if ((uint64_t)sent < passed) {
        save(stream, &stream->shown.unsent, data + sent, passed - sent);
        *judge = 1;
    }
    stream->shown.num_chunks += num_chunks;
    return passed;
}

/* Edge-triggered: a read that leaves room in the buffer has left nothing in the socket. */
static void relay_from(struct relay *relay, struct stream *stream, uint32_t events)
{
    struct bytes *rest = &stream->shown.rest;
    int judge = 0, ended = 0, more = 1;
    while (more && !judge && !ended) {
        uint64_t known = rest->size;
        if (known) memcpy(relay->buffer, rest->at, known);
        ssize_t got = recv(stream->from, relay->buffer + known, READ_BYTES - known, MSG_DONTWAIT);
        if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (got <= 0) break;
        more = known + got == READ_BYTES;
        stream->shown.num_reads++;
        uint64_t passed = pass_on(stream, relay->buffer, known + got, &judge), left = known + got - passed;
        drop(rest);
        if (left) save(stream, rest, relay->buffer + passed, left);
        if (more && !passed) judge = 1;
        ended = !more && (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR));
    }
    if (judge || ended || more) give_back(relay, stream);
}

static struct stream *stream_at(struct relay *relay, uint32_t index)
{
    return &relay->blocks[index / STREAMS_A_BLOCK][index % STREAMS_A_BLOCK];
}

static void nap(uint64_t ns)
{
    struct timespec time = {.tv_nsec = (long)ns};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &time, 0);
}

static void *run(void *argument)
{
    struct relay *relay = argument;
    struct epoll_event events[MAX_EVENTS];
    for (;;) {
        int ready = epoll_wait(relay->poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            uint64_t which = events[i].data.u64;
            if (which == WAKE) return 0;
            struct stream *stream = stream_at(relay, (uint32_t)which);
            pthread_mutex_lock(&stream->lock);
            if (stream->state == LENT && stream->generation == which >> 32) relay_from(relay, stream, events[i].events);
            pthread_mutex_unlock(&stream->lock);
        }
        if (relay->nap_ns && ready >= BUSY_EVENTS) nap(relay->nap_ns);
    }
}

/* --- the caller's side */

static struct stream *free_stream(struct relay *relay)
{
    if (!relay->free && relay->num_blocks < MAX_BLOCKS) {
        struct stream *block = calloc(STREAMS_A_BLOCK, sizeof *block);
        if (!block) return 0;
        for (uint32_t i = STREAMS_A_BLOCK; i-- > 0;) {
            block[i].index = relay->num_blocks * STREAMS_A_BLOCK + i;
            pthread_mutex_init(&block[i].lock, 0);
            block[i].next = relay->free;
            relay->free = &block[i];
        }
        relay->blocks[relay->num_blocks++] = block;
    }
    struct stream *stream = relay->free;
    if (stream) relay->free = stream->next;
    return stream;
}

static void put_away(struct relay *relay, struct stream *stream)
{
    stream->state = FREE;
    stream->generation++;
    stream->next = relay->free;
    relay->free = stream;
}

static struct relay *end(struct relay *relay)
{
    int error = errno;
    if (relay->poller >= 0) close(relay->poller);
    if (relay->wake >= 0) close(relay->wake);
    if (relay->told >= 0) close(relay->told);
    for (uint32_t i = 0; i < relay->num_blocks; i++) free(relay->blocks[i]);
    free(relay);
    errno = error;
    return 0;
}

/* The thread and all it needs; 0 with errno. When many streams are ready at once it naps for `nap_us` between waits, so
 * that what comes meanwhile is passed on together. */
struct relay *relay_start(uint64_t nap_us)
{
    struct relay *relay = calloc(1, sizeof *relay);
    if (!relay) return 0;
    relay->nap_ns = nap_us * 1000;
    relay->returned_end = &relay->returned;
    pthread_mutex_init(&relay->returned_lock, 0);
    relay->poller = epoll_create1(EPOLL_CLOEXEC);
    relay->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    relay->told = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = WAKE};
    if (relay->poller < 0 || relay->wake < 0 || relay->told < 0) return end(relay);
    if (epoll_ctl(relay->poller, EPOLL_CTL_ADD, relay->wake, &event) < 0) return end(relay);
    sigset_t all, before;
    sigfillset(&all); /* signals are for Python's thread */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&relay->thread, 0, run, relay);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (error) {
        errno = error;
        return end(relay);
    }
    pthread_setname_np(relay->thread, "stream-relay");
    return relay;
}

/* All streams must have been taken. */
void relay_end(struct relay *relay)
{
    eventfd_write(relay->wake, 1);
    pthread_join(relay->thread, 0);
    end(relay);
}

/* Readable when relay_returned has something. */
int relay_told(struct relay *relay) { return relay->told; }

/* Send `first` to `to` and go on with what comes from `from`. At most `room` bytes are kept; none if it is 0. 0 with
 * errno if that can't be done: nothing was sent then. Sizes beyond the limits above are the caller's mistake. */
struct stream *relay_lend(struct relay *relay, int from, int to, const char *tail, uint32_t tail_size,
                          const char *old_id, const char *new_id, uint32_t id_size, uint64_t room, uint64_t key,
                          const char *first, uint64_t first_size)
{
    if (tail_size > MAX_TAIL_BYTES || id_size > MAX_ID_BYTES || !tail_size) {
        errno = EINVAL;
        return 0;
    }
    struct stream *stream = free_stream(relay);
    if (!stream) return 0;
    memset(&stream->shown, 0, sizeof stream->shown);
    stream->shown.key = key;
    stream->shown.forgot = !room;
    stream->room = room;
    memcpy(stream->tail, tail, stream->tail_size = tail_size);
    memcpy(stream->old_id, old_id, stream->id_size = id_size);
    memcpy(stream->new_id, new_id, id_size);
    stream->from = fcntl(from, F_DUPFD_CLOEXEC, 0);
    stream->to = fcntl(to, F_DUPFD_CLOEXEC, 0);
    struct epoll_event event = {
        .events = EPOLLIN | EPOLLRDHUP | EPOLLET,
        .data.u64 = (uint64_t)stream->generation << 32 | stream->index,
    };
    pthread_mutex_lock(&stream->lock); /* held until `first` is sent: what follows it may be there already */
    stream->state = LENT;
    if (stream->from < 0 || stream->to < 0 || epoll_ctl(relay->poller, EPOLL_CTL_ADD, stream->from, &event) < 0) {
        int error = errno;
        if (stream->from >= 0) close(stream->from);
        if (stream->to >= 0) close(stream->to);
        put_away(relay, stream);
        pthread_mutex_unlock(&stream->lock);
        errno = error;
        return 0;
    }
    ssize_t sent = send(stream->to, first, first_size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) sent = 0;
    if ((uint64_t)sent < first_size) {
        save(stream, &stream->shown.unsent, first + sent, first_size - sent);
        give_back(relay, stream);
    }
    pthread_mutex_unlock(&stream->lock);
    return stream;
}

/* The next stream that came back, still to be taken; 0 if there is none. */
struct stream *relay_returned(struct relay *relay)
{
    eventfd_t count;
    pthread_mutex_lock(&relay->returned_lock);
    struct stream *stream = relay->returned;
    if (stream && !(relay->returned = stream->next)) relay->returned_end = &relay->returned;
    if (!stream) eventfd_read(relay->told, &count);
    pthread_mutex_unlock(&relay->returned_lock);
    return stream;
}

/* From now on the thread does nothing with it. What it holds may be read until relay_done. */
void relay_take(struct relay *relay, struct stream *stream)
{
    pthread_mutex_lock(&stream->lock);
    if (stream->state == LENT) {
        epoll_ctl(relay->poller, EPOLL_CTL_DEL, stream->from, 0);
    } else { /* it may be among those that came back, which nobody has asked for yet */
        pthread_mutex_lock(&relay->returned_lock);
        for (struct stream **at = &relay->returned; *at; at = &(*at)->next)
            if (*at == stream) {
                if (!(*at = stream->next)) relay->returned_end = at;
                break;
            }
        pthread_mutex_unlock(&relay->returned_lock);
    }
    stream->state = FREE;
    pthread_mutex_unlock(&stream->lock);
    close(stream->from);
    close(stream->to);
}

void relay_done(struct relay *relay, struct stream *stream)
{
    relay_forget(stream->shown.kept);
    drop(&stream->shown.unsent);
    drop(&stream->shown.rest);
    pthread_mutex_lock(&stream->lock);
    put_away(relay, stream);
    pthread_mutex_unlock(&stream->lock);
}
