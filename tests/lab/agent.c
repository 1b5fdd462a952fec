// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
/*
 * The lab's agent: runs in level 1 and does there what a test on the host asks for over a virtio-serial port: start a
 * process and carry its standard streams, connect to or listen on a UNIX socket, send a signal. One process of this
 * program serves each port, one client at a time. When the client goes away, all that it started is killed, so a test
 * that dies leaves nothing behind.
 *
 *   agent PORT...
 *
 * Every message in either direction is a 16-byte little-endian header {u32 magic, u32 type, u32 id, u32 length} and at most
 * MAX_PAYLOAD bytes. The client chooses the ids, except those of accepted connections, which have the top bit set. A client may have died
 * in the middle of a message: a new one therefore sends more zeros than any message is long, then RESET with a
 * nonce. Whatever is not a header is skipped, so RESET is always found; HELLO answers with the nonce.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAGIC 0x47414756u /* "VGAG" */
#define MAX_PAYLOAD 32768u
#define MAX_CHANNELS 256
/* While more than this waits for the client, nothing more is read from processes and sockets. */
#define OUT_HIGH_WATER (256u * 1024)
/* A process or socket that does not take what it is sent: the channel is closed. */
#define IN_LIMIT (64u * 1024 * 1024)

enum {
    /* client to agent */
    RESET = 1,   /* nonce[16] */
    SPAWN = 2,   /* NUL-terminated: directory, then "NAME=value" ..., "" , then argv */
    INPUT = 3,   /* for stdin or a socket; empty: end of input */
    SIGNAL = 4,  /* u32 signal: to the process group that SPAWN made */
    CONNECT = 5, /* path */
    LISTEN = 6,  /* path */
    CLOSE = 7,
    /* agent to client */
    HELLO = 0x81,    /* nonce[16] */
    STARTED = 0x82,  /* u32 pid; also answers CONNECT and LISTEN, with 0 */
    FAILED = 0x83,   /* u32 errno */
    OUTPUT = 0x84,   /* stdout, or a socket; empty: end */
    ERROR = 0x85,    /* stderr; empty: end */
    EXIT = 0x86,     /* u32 wait status; after both ends of output */
    ACCEPTED = 0x87, /* u32 id of the new channel */
};

struct header {
    uint32_t magic, type, id, length;
};

struct buffer {
    char *data;
    size_t start, end, size;
};

struct channel {
    uint32_t id;
    enum { FREE, PROCESS, SOCKET, LISTENER } kind;
    pid_t pid;
    int in, out, err; /* fds; a socket uses in and out, which are then dups of each other */
    int status, exited, in_done;
    struct buffer to;
};

static int port;
static struct channel channels[MAX_CHANNELS];
static uint32_t next_accepted;
static struct buffer out;
static char in[sizeof(struct header) + MAX_PAYLOAD];
static size_t in_length;

static void fatal(const char *what)
{
    fprintf(stderr, "agent: %s: %s\n", what, strerror(errno));
    exit(1);
}

static size_t buffered(const struct buffer *b)
{
    return b->end - b->start;
}

static void append(struct buffer *b, const void *data, size_t length)
{
    if (b->start == b->end)
        b->start = b->end = 0;
    if (b->size - b->end < length) {
        memmove(b->data, b->data + b->start, buffered(b));
        b->end -= b->start;
        b->start = 0;
        if (b->size - b->end < length) {
            b->size = (b->end + length) * 2;
            b->data = realloc(b->data, b->size);
            if (!b->data)
                fatal("out of memory");
        }
    }
    memcpy(b->data + b->end, data, length);
    b->end += length;
}

/* Writes what fd takes now. False: the reader is gone. */
static int drain(struct buffer *b, int fd)
{
    while (buffered(b)) {
        ssize_t n = write(fd, b->data + b->start, buffered(b));
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 && errno == EAGAIN;
        b->start += n;
    }
    return 1;
}

static void reply(uint32_t type, uint32_t id, const void *payload, uint32_t length)
{
    struct header h = {MAGIC, type, id, length};

    append(&out, &h, sizeof(h));
    append(&out, payload, length);
}

static void reply_u32(uint32_t type, uint32_t id, uint32_t value)
{
    reply(type, id, &value, sizeof(value));
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static struct channel *find(uint32_t id)
{
    for (int i = 0; i < MAX_CHANNELS; i++)
        if (channels[i].kind != FREE && channels[i].id == id)
            return &channels[i];
    return NULL;
}

static struct channel *new_channel(uint32_t id)
{
    if (find(id)) {
        errno = EEXIST;
        return NULL;
    }
    for (int i = 0; i < MAX_CHANNELS; i++)
        if (channels[i].kind == FREE) {
            channels[i] = (struct channel){.id = id, .in = -1, .out = -1, .err = -1};
            return &channels[i];
        }
    errno = EMFILE;
    return NULL;
}

static void free_channel(struct channel *c)
{
    close_fd(&c->in);
    close_fd(&c->out);
    close_fd(&c->err);
    free(c->to.data);
    *c = (struct channel){.in = -1, .out = -1, .err = -1};
}

static void kill_children(void)
{
    char path[64];
    FILE *list;
    int pid;

    snprintf(path, sizeof(path), "/proc/self/task/%d/children", getpid());
    list = fopen(path, "re");
    if (!list)
        fatal(path);
    while (fscanf(list, "%d", &pid) == 1)
        kill(pid, SIGKILL);
    fclose(list);
}

static void forget_everything(void)
{
    for (int i = 0; i < MAX_CHANNELS; i++) {
        struct channel *c = &channels[i];
        if (c->kind == PROCESS)
            kill(-c->pid, SIGKILL);
        free_channel(c);
    }
    /* Gone means gone, before the next client hears HELLO: also what left its process group and was inherited. */
    do
        kill_children();
    while (waitpid(-1, NULL, 0) > 0);
    out.start = out.end = 0;
}

static void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void run_child(char *payload, size_t length, int input, int output, int error, int report)
{
    char *argv[1024], *end = payload + length, *p = payload;
    char *directory = p;
    size_t n = 0;
    int failure;
    sigset_t none;

    setpgid(0, 0);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    if (dup2(input, 0) < 0 || dup2(output, 1) < 0 || dup2(error, 2) < 0)
        goto failed;
    for (p += strlen(p) + 1; p < end && *p; p += strlen(p) + 1)
        putenv(p);
    for (p++; p < end && n < 1023; p += strlen(p) + 1)
        argv[n++] = p;
    argv[n] = NULL;
    errno = EINVAL;
    if (!n || (*directory && chdir(directory)))
        goto failed;
    execvp(argv[0], argv);
failed:
    failure = errno;
    if (write(report, &failure, sizeof(failure)) < 0)
        _exit(126);
    _exit(127);
}

static void spawn(uint32_t id, char *payload, size_t length)
{
    struct channel *c = new_channel(id);
    int input[2] = {-1, -1}, output[2] = {-1, -1}, error[2] = {-1, -1}, report[2] = {-1, -1}, failure = 0;

    if (!c || !length || payload[length - 1] || pipe2(input, O_CLOEXEC) || pipe2(output, O_CLOEXEC) ||
        pipe2(error, O_CLOEXEC) || pipe2(report, O_CLOEXEC)) {
        failure = errno ? errno : EINVAL;
        goto done;
    }
    c->pid = fork();
    if (c->pid < 0) {
        failure = errno;
        goto done;
    }
    if (!c->pid)
        run_child(payload, length, input[0], output[1], error[1], report[1]);
    setpgid(c->pid, c->pid);
    close_fd(&report[1]);
    /* Closed by exec: an empty pipe means that the program runs. */
    if (read(report[0], &failure, sizeof(failure)) > 0) {
        waitpid(c->pid, NULL, 0);
        goto done;
    }
    c->kind = PROCESS;
    c->in = input[1];
    c->out = output[0];
    c->err = error[0];
    input[1] = output[0] = error[0] = -1;
    set_nonblocking(c->in);
    set_nonblocking(c->out);
    set_nonblocking(c->err);
    reply_u32(STARTED, id, c->pid);
done:
    if (failure)
        reply_u32(FAILED, id, failure);
    for (int i = 0; i < 2; i++) {
        close_fd(&input[i]);
        close_fd(&output[i]);
        close_fd(&error[i]);
        close_fd(&report[i]);
    }
}

static void open_socket(uint32_t id, int listening, const char *path, size_t length)
{
    struct channel *c = new_channel(id);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    int fd = -1;

    errno = c ? ENAMETOOLONG : errno;
    if (!c || length >= sizeof(address.sun_path))
        goto failed;
    memcpy(address.sun_path, path, length);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        goto failed;
    if (listening ? bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 16)
                  : connect(fd, (struct sockaddr *)&address, sizeof(address)))
        goto failed;
    set_nonblocking(fd);
    c->kind = listening ? LISTENER : SOCKET;
    c->out = fd;
    if (!listening)
        c->in = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    reply_u32(STARTED, id, 0);
    return;
failed:
    reply_u32(FAILED, id, errno);
    if (fd >= 0)
        close(fd);
}

static void take_connection(struct channel *listener)
{
    int fd = accept4(listener->out, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct channel *c;

    if (fd < 0)
        return;
    c = new_channel(0x80000000u | next_accepted++);
    if (!c) {
        close(fd);
        return;
    }
    c->kind = SOCKET;
    c->out = fd;
    c->in = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    reply_u32(ACCEPTED, listener->id, c->id);
}

static void end_input(struct channel *c)
{
    if (c->kind == SOCKET && c->in >= 0)
        shutdown(c->in, SHUT_WR);
    close_fd(&c->in);
}

static void feed(struct channel *c)
{
    if (c->in < 0)
        return;
    if (!drain(&c->to, c->in)) {
        c->to.start = c->to.end = 0;
        close_fd(&c->in);
    } else if (c->in_done && !buffered(&c->to)) {
        end_input(c);
    }
}

static void handle(const struct header *h, char *payload)
{
    struct channel *c = find(h->id);

    switch (h->type) {
    case RESET:
        if (h->length != 16)
            return;
        forget_everything();
        reply(HELLO, 0, payload, 16);
        return;
    case SPAWN:
        spawn(h->id, payload, h->length);
        return;
    case CONNECT:
    case LISTEN:
        open_socket(h->id, h->type == LISTEN, payload, h->length);
        return;
    }
    if (!c)
        return; /* it ended while the message was under way */
    switch (h->type) {
    case INPUT:
        if (!h->length)
            c->in_done = 1;
        else if (c->in >= 0 && buffered(&c->to) + h->length <= IN_LIMIT)
            append(&c->to, payload, h->length);
        feed(c);
        break;
    case SIGNAL:
        if (c->kind == PROCESS && h->length == 4 && !c->exited)
            kill(-c->pid, *(uint32_t *)payload);
        break;
    case CLOSE:
        if (c->kind != PROCESS)
            free_channel(c);
        break;
    }
}

/* Takes whole messages off the front of what was received; skips what is no message. */
static void parse(void)
{
    static char payload[MAX_PAYLOAD];
    size_t at = 0;

    while (in_length - at >= sizeof(struct header)) {
        struct header h;
        memcpy(&h, in + at, sizeof(h));
        if (h.magic != MAGIC || h.length > MAX_PAYLOAD) {
            at++;
            continue;
        }
        if (in_length - at < sizeof(h) + h.length)
            break;
        memcpy(payload, in + at + sizeof(h), h.length);
        at += sizeof(h) + h.length;
        handle(&h, payload);
    }
    memmove(in, in + at, in_length - at);
    in_length -= at;
}

/* Forwards what fd has. False: end of file. */
static int forward(struct channel *c, int fd, uint32_t type)
{
    static char data[MAX_PAYLOAD];
    ssize_t n = read(fd, data, sizeof(data));

    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 1;
    reply(type, c->id, data, n > 0 ? n : 0);
    return n > 0;
}

static void collect_exits(int signals)
{
    struct signalfd_siginfo info;
    pid_t pid;
    int status;

    while (read(signals, &info, sizeof(info)) > 0)
        ;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (int i = 0; i < MAX_CHANNELS; i++)
            if (channels[i].kind == PROCESS && channels[i].pid == pid) {
                channels[i].exited = 1;
                channels[i].status = status;
            }
}

/* The process is gone and all that it wrote is told. */
static void finish(struct channel *c)
{
    if (c->kind == PROCESS && c->exited && c->out < 0 && c->err < 0) {
        reply_u32(EXIT, c->id, c->status);
        free_channel(c);
    }
}

static void serve(int signals)
{
    struct pollfd fds[2 + 3 * MAX_CHANNELS];
    int present = 0;

    for (;;) {
        int n = 0;
        int room = buffered(&out) < OUT_HIGH_WATER;

        fds[n++] = (struct pollfd){port, POLLIN | (buffered(&out) ? POLLOUT : 0), 0};
        fds[n++] = (struct pollfd){signals, POLLIN, 0};
        for (int i = 0; i < MAX_CHANNELS; i++) {
            struct channel *c = &channels[i];
            fds[n++] = (struct pollfd){room ? c->out : -1, POLLIN, 0};
            fds[n++] = (struct pollfd){room ? c->err : -1, POLLIN, 0};
            fds[n++] = (struct pollfd){buffered(&c->to) ? c->in : -1, POLLOUT, 0};
            if (c->kind == FREE)
                fds[n - 1].fd = fds[n - 2].fd = fds[n - 3].fd = -1;
        }
        /* A port without a client reports POLLHUP all the time: look for the next one ten times a second. */
        if (poll(fds, n, -1) < 0 && errno != EINTR)
            fatal("poll");

        if (fds[0].revents & POLLHUP) {
            if (present)
                forget_everything();
            present = 0;
            in_length = 0;
            usleep(100000);
            continue;
        }
        if (fds[1].revents)
            collect_exits(signals);
        for (int i = 0; i < MAX_CHANNELS; i++) {
            struct channel *c = &channels[i];
            if (c->kind == FREE)
                continue;
            if (fds[2 + 3 * i].revents && c->kind == LISTENER)
                take_connection(c);
            else if (fds[2 + 3 * i].revents && !forward(c, c->out, OUTPUT)) {
                close_fd(&c->out);
                if (c->kind == SOCKET) {
                    free_channel(c);
                    continue;
                }
            }
            if (fds[2 + 3 * i + 1].revents && !forward(c, c->err, ERROR))
                close_fd(&c->err);
            if (fds[2 + 3 * i + 2].revents)
                feed(c);
            finish(c);
        }
        if (fds[0].revents & POLLIN) {
            ssize_t got = read(port, in + in_length, sizeof(in) - in_length);
            if (got > 0) {
                present = 1;
                in_length += got;
                parse();
            }
        }
        if (buffered(&out))
            drain(&out, port);
    }
}

static void serve_port(const char *path)
{
    sigset_t child;
    int signals;

    port = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (port < 0)
        fatal(path);
    /* What a killed process leaves behind becomes a child of this one and is reaped here. */
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signals = signalfd(-1, &child, SFD_NONBLOCK | SFD_CLOEXEC);
    if (signals < 0)
        fatal("signalfd");
    for (int i = 0; i < MAX_CHANNELS; i++)
        channels[i] = (struct channel){.in = -1, .out = -1, .err = -1};
    serve(signals);
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        pid_t pid = fork();
        if (pid < 0)
            fatal("fork");
        if (!pid)
            serve_port(argv[i]);
    }
    /* As level 1's init this process also reaps the orphans. */
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR)
        ;
    return 1;
}
