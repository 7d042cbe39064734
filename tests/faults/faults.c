/* Lets the n-th system call of a kind fail, or kills the process there: for LD_PRELOAD.
 *
 * FAULT_FOLDER  only calls on files in it, and on itself, count
 * FAULT_CALL    open, read, write, fsync, rename, ftruncate, unlink, or any
 * FAULT_NTH     which of them, from 1; 0: none
 * FAULT_ERRNO   what it fails with
 * FAULT_SIGNAL  the signal that comes just before it, and it succeeds, in the place of failing
 * FAULT_COUNT   a file for the number of calls, written when the process ends
 * FAULT_SLOW    seconds that it takes; without FAULT_ERRNO it succeeds then
 * FAULT_CLOCK   seconds by which the time of day jumps with every second look at it
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static long counted;

static long number(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static int within(const char *path) {
    const char *folder = getenv("FAULT_FOLDER");
    size_t size = folder ? strlen(folder) : 0;
    return size && path && !strncmp(path, folder, size) && (!path[size] || path[size] == '/');
}

static int open_within(int file) {
    char name[64], path[PATH_MAX];
    snprintf(name, sizeof name, "/proc/self/fd/%d", file);
    ssize_t size = readlink(name, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return within(path);
}

/* Whether this call is to fail; errno is set. */
static int fails(const char *call, int here) {
    const char *wanted = getenv("FAULT_CALL");
    if (!here || !wanted || (strcmp(wanted, call) && strcmp(wanted, "any"))) return 0;
    if (__sync_add_and_fetch(&counted, 1) != number("FAULT_NTH")) return 0;
    if (number("FAULT_SLOW")) {
        sleep((unsigned)number("FAULT_SLOW"));
        if (!number("FAULT_ERRNO")) return 0;
    }
    if (number("FAULT_SIGNAL")) {
        kill(getpid(), (int)number("FAULT_SIGNAL"));
        return 0;
    }
    errno = (int)number("FAULT_ERRNO");
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opened(const char *path, int flags, mode_t mode) {
    if (fails("open", within(path))) return -1;
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

#define OPEN(name)                                      \
    int name(const char *path, int flags, ...) {        \
        va_list rest;                                   \
        va_start(rest, flags);                          \
        mode_t mode = va_arg(rest, mode_t);             \
        va_end(rest);                                   \
        return opened(path, flags | O_LARGEFILE, mode); \
    }
OPEN(open)
OPEN(open64)

ssize_t read(int file, void *data, size_t size) {
    if (fails("read", open_within(file))) return -1;
    return REAL(read)(file, data, size);
}

ssize_t write(int file, const void *data, size_t size) {
    if (fails("write", open_within(file))) return -1;
    return REAL(write)(file, data, size);
}

int fsync(int file) {
    if (fails("fsync", open_within(file))) return -1;
    return REAL(fsync)(file);
}

int rename(const char *from, const char *to) {
    if (fails("rename", within(to))) return -1;
    return REAL(rename)(from, to);
}

int ftruncate(int file, off_t size) {
    if (fails("ftruncate", open_within(file))) return -1;
    return (int)syscall(SYS_ftruncate, file, size);
}

int ftruncate64(int file, off64_t size) {
    if (fails("ftruncate", open_within(file))) return -1;
    return (int)syscall(SYS_ftruncate, file, size);
}

int unlink(const char *path) {
    if (fails("unlink", within(path))) return -1;
    return REAL(unlink)(path);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static long looks;
    int result = (int)syscall(SYS_clock_gettime, clock, now);
    if (clock == CLOCK_REALTIME && ++looks % 2) now->tv_sec += number("FAULT_CLOCK");
    return result;
}

__attribute__((destructor)) static void tell(void) {
    const char *path = getenv("FAULT_COUNT");
    if (!path) return;
    FILE *file = fopen(path, "w");
    if (!file) return;
    fprintf(file, "%ld", counted);
    fclose(file);
}
