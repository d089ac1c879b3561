/* Calls on files below FAULTS_ROOT that fail when they are told to: preload it.
 *
 *     gcc -shared -fPIC -O1 -o faults.so faults.c -ldl
 *
 * faults_arm(kind, n, sticky, error): from now on the n-th call of this kind fails, and with
 * `sticky` all that follow. With error 0 it is not failed but cut short: a read or write of half
 * the bytes. faults_seen() is how many such calls there were, faults_fired() how many failed.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, READ, WRITE, FSYNC, RENAME, UNLINK, MKDIR, ALLOCATE, CLOSE };

static int armed = -1, wanted, lasting, error_number, seen, fired;

void faults_arm(int kind, int n, int sticky, int error) {
    armed = kind, wanted = n, lasting = sticky, error_number = error, seen = fired = 0;
}
int faults_seen(void) { return seen; }
int faults_fired(void) { return fired; }

static int below(const char *path) {
    const char *root = getenv("FAULTS_ROOT");
    size_t length = root ? strlen(root) : 0;
    return length && !strncmp(path, root, length);
}

/* Whether a path, maybe relative to a folder that is open, is below the root. */
static int path_below(int folder, const char *path) {
    char link[64], base[PATH_MAX];
    ssize_t length;
    if (path[0] == '/') return below(path);
    if (folder == AT_FDCWD) return getcwd(base, sizeof base) && below(base);
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, base, sizeof base - 1);
    return length > 0 && (base[length] = 0, below(base));
}

static int file_below(int file) { return path_below(file, ""); }

/* Whether this call is to fail. */
static int fails(int kind, int is_below) {
    int number;
    if (kind != armed || !is_below) return 0;
    number = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (lasting ? number < wanted : number != wanted) return 0;
    __atomic_add_fetch(&fired, 1, __ATOMIC_SEQ_CST);
    errno = error_number;
    return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define SHORT (error_number == 0)

static mode_t mode_of(int flags, va_list rest) {
    return flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}
#define OPENS(name)                                                                     \
    int name(const char *path, int flags, ...) {                                        \
        va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest);        \
        va_end(rest);                                                                   \
        return fails(OPEN, path_below(AT_FDCWD, path)) ? -1 : REAL(name)(path, flags, mode); }
OPENS(open) OPENS(open64)
#define OPENS_AT(name)                                                                  \
    int name(int folder, const char *path, int flags, ...) {                            \
        va_list rest; va_start(rest, flags); mode_t mode = mode_of(flags, rest);        \
        va_end(rest);                                                                   \
        return fails(OPEN, path_below(folder, path)) ? -1 : REAL(name)(folder, path, flags, mode); }
OPENS_AT(openat) OPENS_AT(openat64)

/* Cut short is half of what could be moved. Direct reads must ask for whole blocks. */
static ssize_t half(ssize_t size) { return size > 1 ? size / 2 : size; }
#define MOVES(kind, name, data, ...)                                                    \
    if (fails(kind, file_below(file))) {                                                \
        if (!SHORT) return -1;                                                          \
        size = half(size);                                                              \
    }                                                                                   \
    return REAL(name)(file, data, size, ##__VA_ARGS__);
#define READS_AT(name, data, ...)                                                       \
    int failing = fails(READ, file_below(file));                                        \
    if (failing && !SHORT) return -1;                                                   \
    ssize_t done = REAL(name)(file, data, ##__VA_ARGS__);                               \
    return failing ? half(done) : done;
ssize_t read(int file, void *data, size_t size) { MOVES(READ, read, data) }
ssize_t pread(int file, void *data, size_t size, off_t at) { READS_AT(pread, data, size, at) }
ssize_t pread64(int file, void *data, size_t size, off64_t at) { READS_AT(pread64, data, size, at) }
ssize_t preadv(int file, const struct iovec *parts, int count, off_t at) { READS_AT(preadv, parts, count, at) }
ssize_t preadv64(int file, const struct iovec *parts, int count, off64_t at) { READS_AT(preadv64, parts, count, at) }
ssize_t preadv2(int file, const struct iovec *parts, int count, off_t at, int flags) { READS_AT(preadv2, parts, count, at, flags) }
ssize_t preadv64v2(int file, const struct iovec *parts, int count, off64_t at, int flags) { READS_AT(preadv64v2, parts, count, at, flags) }
ssize_t write(int file, const void *data, size_t size) { MOVES(WRITE, write, data) }
ssize_t pwrite(int file, const void *data, size_t size, off_t at) { MOVES(WRITE, pwrite, data, at) }
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) { MOVES(WRITE, pwrite64, data, at) }

/* Several parts cut short are half of the first of them. */
#define SCATTERS(kind, name)                                                            \
    struct iovec first = parts[0];                                                      \
    if (!fails(kind, file_below(file))) return REAL(name)(file, parts, count);          \
    if (!SHORT) return -1;                                                              \
    first.iov_len = half(first.iov_len);                                                \
    return REAL(name)(file, &first, 1);
ssize_t readv(int file, const struct iovec *parts, int count) { SCATTERS(READ, readv) }
ssize_t writev(int file, const struct iovec *parts, int count) { SCATTERS(WRITE, writev) }

ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    if (!SHORT && (fails(WRITE, file_below(to)) || fails(READ, file_below(from)))) return -1;
    return REAL(sendfile)(to, from, at, size);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t size) {
    if (!SHORT && (fails(WRITE, file_below(to)) || fails(READ, file_below(from)))) return -1;
    return REAL(sendfile64)(to, from, at, size);
}
int fsync(int file) { return fails(FSYNC, file_below(file)) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails(FSYNC, file_below(file)) ? -1 : REAL(fdatasync)(file); }
int rename(const char *from, const char *to) {
    return fails(RENAME, path_below(AT_FDCWD, to)) ? -1 : REAL(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    return fails(RENAME, path_below(b, to)) ? -1 : REAL(renameat)(a, from, b, to);
}
int unlink(const char *path) {
    return fails(UNLINK, path_below(AT_FDCWD, path)) ? -1 : REAL(unlink)(path);
}
int rmdir(const char *path) {
    return fails(UNLINK, path_below(AT_FDCWD, path)) ? -1 : REAL(rmdir)(path);
}
int unlinkat(int folder, const char *path, int flags) {
    return fails(UNLINK, path_below(folder, path)) ? -1 : REAL(unlinkat)(folder, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    return fails(MKDIR, path_below(AT_FDCWD, path)) ? -1 : REAL(mkdir)(path, mode);
}
int mkdirat(int folder, const char *path, mode_t mode) {
    return fails(MKDIR, path_below(folder, path)) ? -1 : REAL(mkdirat)(folder, path, mode);
}
int ftruncate(int file, off_t size) {
    return fails(ALLOCATE, file_below(file)) ? -1 : REAL(ftruncate)(file, size);
}
int ftruncate64(int file, off64_t size) {
    return fails(ALLOCATE, file_below(file)) ? -1 : REAL(ftruncate64)(file, size);
}
/* These return the error, and leave errno alone. */
int posix_fallocate(int file, off_t at, off_t size) {
    return fails(ALLOCATE, file_below(file)) ? error_number : REAL(posix_fallocate)(file, at, size);
}
int posix_fallocate64(int file, off64_t at, off64_t size) {
    return fails(ALLOCATE, file_below(file)) ? error_number : REAL(posix_fallocate64)(file, at, size);
}
/* A file is closed also when that says that something is wrong. */
int close(int file) {
    int failing = fails(CLOSE, file_below(file)), kept = errno, done = REAL(close)(file);
    return failing ? (errno = kept, -1) : done;
}
