/* The floor of what relaying costs on this machine: a TCP relay in C that parses nothing.
 *
 *     bare_relay PORT BACKEND_PORT...
 *
 * Every client connection gets a connection to the next backend (all on 127.0.0.1), and each read is one write to the
 * other side: epoll, recv, send, nothing else. It has one leg where a prefill/decode proxy has two. As pd-proxy does, it
 * lets acknowledgements wait (TCP_QUICKACK off). For benchmarks only: a full socket buffer is waited for.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_FDS = 65536, MAX_EVENTS = 1024, BUFFER_BYTES = 1 << 18 };

static int peer[MAX_FDS]; /* of each open connection; 0 for none */
static int poller;

static struct sockaddr_in loopback(int port)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static void watch(int fd, int other)
{
    int yes = 1, no = 0;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    setsockopt(fd, IPPROTO_TCP, TCP_QUICKACK, &no, sizeof no);
    peer[fd] = other;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
}

static void accept_from(int listener, const char *backend)
{
    int client = accept(listener, 0, 0);
    if (client < 0) return;
    int server = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in address = loopback(atoi(backend));
    if (client >= MAX_FDS || server >= MAX_FDS || connect(server, (void *)&address, sizeof address) < 0) {
        close(client);
        close(server);
        return;
    }
    watch(client, server);
    watch(server, client);
}

static void relay_from(int fd)
{
    static char buffer[BUFFER_BYTES];
    int other = peer[fd];
    if (!other) return; /* closed with its peer, earlier in this round */
    ssize_t got = recv(fd, buffer, sizeof buffer, 0);
    for (ssize_t sent = 0, n; got > 0 && sent < got; sent += n)
        if ((n = send(other, buffer + sent, got - sent, MSG_NOSIGNAL)) < 0) got = 0;
    if (got <= 0) {
        peer[fd] = peer[other] = 0;
        close(fd);
        close(other);
    }
}

int main(int argc, char **argv)
{
    int yes = 1, next = 0, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (argc < 3) return 2;
    struct sockaddr_in address = loopback(atoi(argv[1]));
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (void *)&address, sizeof address) < 0 || listen(listener, 4096) < 0) return 1;
    poller = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[MAX_EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            if (events[i].data.fd == listener) accept_from(listener, argv[2 + next++ % (argc - 2)]);
            else relay_from(events[i].data.fd);
        }
    }
}
