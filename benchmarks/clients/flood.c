// Clients that cost next to nothing themselves, all with one and the same request.
//
//     flood PORT CLIENTS SECONDS FRESH RATE < REQUEST     FRESH: 1 for a connection for each request, 0 to keep them
//
// RATE 0 is a closed loop: each client asks again as soon as it is answered, and what is not answered in SECONDS is
// forgotten. Otherwise so many requests a second are due, as a Poisson process, whatever becomes of those before; each
// is for a client that is free, of CLIENTS at most, and after SECONDS all are waited for, for PATIENCE seconds.
//
// Prints a line of JSON: answers in SECONDS and after them, by the first digit of their status ("0xx" is anything else),
// what was sent and due, what broke or never was answered, milliseconds that half of the refusals took at most, since
// they were due, seconds of processor time, seconds.
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD 4096
#define PATIENCE 60
#define REFUSALS (1 << 22)
typedef struct Client {
  int fd;             // 0: not connected yet
  size_t got;         // bytes of the answer so far
  char head[HEAD];    // its beginning
  long whole;         // how many it will have; 0 until that is known
  double due;         // of the request that waits for its answer; 0: it is free
  struct Client *next;  // that is free
} Client;

static char request[1 << 16];
static size_t request_size;
static struct sockaddr_in server = {.sin_family = AF_INET};
static long answers[6], late[6], sent, broken, waiting, refusals;
static float *refused;
static int poll_fd, fresh;
static double begun, end, rate;
static Client *free_ones;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void join(Client *c) {
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  struct linger drop = {1, 0};  // no port waits for a minute
  setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &drop, sizeof drop);
  if (connect(c->fd, (struct sockaddr *)&server, sizeof server)) perror("connect"), exit(1);
  struct epoll_event event = {EPOLLIN, {.ptr = c}};
  epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event);
}

static void ask(Client *c, double due) {
  if (!c->fd) join(c);
  c->got = 0, c->whole = 0, c->due = due;
  sent++, waiting++;
  if (send(c->fd, request, request_size, MSG_NOSIGNAL) != (ssize_t)request_size) errno = 0;  // it will break
}

static void leave(Client *c) {
  if (c->fd) close(c->fd);
  c->fd = 0;
}

static void rest(Client *c) {
  c->due = 0, waiting--;
  if (rate) c->next = free_ones, free_ones = c;
  else ask(c, now());
}

static void answered(Client *c) {
  double at = now();
  int class = c->head[9] - '0', known = class > 0 && class < 6 ? class : 0;
  (at < end ? answers : late)[known]++;
  if (known > 3 && refusals < REFUSALS) refused[refusals++] = 1e3 * (at - c->due);
  if (fresh || strcasestr(c->head, "connection: close")) leave(c);
  rest(c);
}

static void hear(Client *c) {
  char more[1 << 16];
  int heading = c->got < HEAD - 1;
  ssize_t n = heading ? recv(c->fd, c->head + c->got, HEAD - 1 - c->got, 0) : recv(c->fd, more, sizeof more, 0);
  if (n <= 0) {
    leave(c);
    if (c->due) broken++, rest(c);
    return;
  }
  c->got += n;
  if (heading && !c->whole) {
    c->head[c->got] = 0;
    char *body = strstr(c->head, "\r\n\r\n"), *size = strcasestr(c->head, "content-length:");
    if (!body) return;
    c->whole = body + 4 - c->head + (size && size < body ? atol(size + 15) : 0);
  }
  if (c->due && c->got >= (size_t)c->whole) answered(c);
}

static int ascending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x > y) - (x < y);
}

static void tell(const char *name, const long *counts) {
  printf("\"%s\": {", name);
  for (int i = 0; i < 6; i++) printf("%s\"%dxx\": %ld", i ? ", " : "", i, counts[i]);
  printf("}, ");
}

static void report(void) {
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  double cpu_s = used.ru_utime.tv_sec + used.ru_stime.tv_sec + (used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
  qsort(refused, refusals, sizeof *refused, ascending);
  printf("{");
  tell("answers", answers), tell("late", late);
  printf("\"sent\": %ld, \"broken\": %ld, \"refused_p50_ms\": %.3f, ", sent, rate ? broken + waiting : broken,
         refusals ? refused[refusals / 2] : 0);
  printf("\"cpu_s\": %.3f, \"seconds\": %.2f}\n", cpu_s, end - begun);
}

int main(int argc, char **argv) {
  if (argc != 6) return fprintf(stderr, "flood PORT CLIENTS SECONDS FRESH RATE < REQUEST\n"), 2;
  int count = atoi(argv[2]);
  server.sin_port = htons(atoi(argv[1]));
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  fresh = atoi(argv[4]), rate = atof(argv[5]);
  request_size = fread(request, 1, sizeof request, stdin);
  poll_fd = epoll_create1(0);
  Client *clients = calloc(count, sizeof *clients);
  refused = calloc(REFUSALS, sizeof *refused);
  begun = now(), end = begun + atof(argv[3]);
  srand48(1);
  double due = rate ? begun : INFINITY;
  for (int i = 0; i < count; i++) {
    if (rate) clients[i].next = free_ones, free_ones = &clients[i];
    else ask(&clients[i], begun);
  }
  struct epoll_event events[256];
  for (double at; (at = now()) < end || (rate && waiting && at < end + PATIENCE);) {
    double left = fmin(0.1, due - at);
    int ready = epoll_wait(poll_fd, events, 256, left > 0 ? ceil(1e3 * left) : 0);
    for (int i = 0; i < ready; i++) hear(events[i].data.ptr);
    for (; due <= now() && due < end; due -= log(1 - drand48()) / rate) {
      Client *c = free_ones;
      if (!c) { broken++, sent++; continue; }
      free_ones = c->next;
      ask(c, due);
    }
    if (due >= end) due = INFINITY;
  }
  report();
}
