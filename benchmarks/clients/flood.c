// A closed loop of clients that ask again as soon as they are answered, and cost next to nothing themselves.
//
//     flood PORT CLIENTS SECONDS FRESH < REQUEST      FRESH: 1 for a connection for each request, 0 to keep them
//
// Prints a line of JSON: answers by the first digit of their status, connections that broke, seconds.
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD 4096
typedef struct {
  int fd;
  size_t got;         // bytes of the answer so far
  char head[HEAD];    // its beginning
  long whole;         // how many it will have; 0 until that is known
} Client;

static char request[1 << 16];
static size_t request_size;
static struct sockaddr_in server = {.sin_family = AF_INET};
static long answers[6], broken;
static int poll_fd, fresh;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec / 1e9;
}

static void ask(Client *c) {
  c->got = 0, c->whole = 0;
  if (send(c->fd, request, request_size, MSG_NOSIGNAL) != (ssize_t)request_size) broken++;
}

static void join(Client *c) {
  c->fd = socket(AF_INET, SOCK_STREAM, 0);
  struct linger drop = {1, 0};  // no port waits for a minute
  setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &drop, sizeof drop);
  if (connect(c->fd, (struct sockaddr *)&server, sizeof server)) perror("connect"), exit(1);
  struct epoll_event event = {EPOLLIN, {.ptr = c}};
  epoll_ctl(poll_fd, EPOLL_CTL_ADD, c->fd, &event);
  ask(c);
}

static void again(Client *c, int anew) {
  if (!anew) return ask(c);
  close(c->fd);
  join(c);
}

static void hear(Client *c) {
  char rest[1 << 16];
  int heading = c->got < HEAD - 1;
  ssize_t n = heading ? recv(c->fd, c->head + c->got, HEAD - 1 - c->got, 0) : recv(c->fd, rest, sizeof rest, 0);
  if (n <= 0) return broken++, again(c, 1);
  c->got += n;
  if (heading && !c->whole) {
    c->head[c->got] = 0;
    char *end = strstr(c->head, "\r\n\r\n"), *size = strcasestr(c->head, "content-length:");
    if (!end) return;
    c->whole = end + 4 - c->head + (size && size < end ? atol(size + 15) : 0);
  }
  if (c->got < (size_t)c->whole) return;
  int class = c->head[9] - '0';
  answers[class > 0 && class < 6 ? class : 0]++;
  char *hangs_up = strcasestr(c->head, "connection: close");
  again(c, fresh || hangs_up);
}

int main(int argc, char **argv) {
  if (argc != 5) return fprintf(stderr, "flood PORT CLIENTS SECONDS FRESH < REQUEST\n"), 2;
  int count = atoi(argv[2]);
  server.sin_port = htons(atoi(argv[1]));
  server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  fresh = atoi(argv[4]);
  request_size = fread(request, 1, sizeof request, stdin);
  poll_fd = epoll_create1(0);
  Client *clients = calloc(count, sizeof *clients);
  double begun = now(), end = begun + atof(argv[3]);
  for (int i = 0; i < count; i++) join(&clients[i]);
  struct epoll_event events[256];
  while (now() < end) {
    int ready = epoll_wait(poll_fd, events, 256, 100);
    for (int i = 0; i < ready; i++) hear(events[i].data.ptr);
  }
  printf("{\"200\": %ld, \"300\": %ld, \"400\": %ld, \"500\": %ld, \"broken\": %ld, \"seconds\": %.2f}\n", answers[2],
         answers[3], answers[4], answers[5], broken, now() - begun);
}
