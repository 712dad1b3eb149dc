/* Write a file anew in whole huge pages, and put it in the old one's place.
 *
 * For a file that others hold in small pages, where the kernel cannot collapse
 * those (before Linux 7.2).  They keep the old file. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/limits.h> /* XATTR_... */
#ifdef __GLIBC__
#include <linux/stat.h>
#endif
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "warm.h"

/* Open the directory where a file lies now; `path` becomes its resolved path,
 * `name` its last part.  Returns a descriptor or -1. */
static int
open_directory(int fd, char path[static PATH_MAX], char **name)
{
    char link[64];
    struct stat here, there;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    *name = strrchr(path, '/');
    if (!*name)
        return -1;
    *(*name)++ = 0;
    int directory =
        open(*path ? path : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        return -1;
    if (fstatat(directory, *name, &there, AT_SYMLINK_NOFOLLOW)
        || fstat(fd, &here) || here.st_ino != there.st_ino
        || here.st_dev != there.st_dev) {
        close(directory);
        errno = ESTALE;
        return -1;
    }
    return directory;
}

/* Copy with writes of a whole huge page each.  The source is mapped and in
 * memory, for a short copy makes the kernel use smaller pages. */
static bool
copy_content(int from, int to, size_t size)
{
    char *source = map_range(from, 0, size);
    bool good = source != NULL;

    for (size_t at = 0; good && at < size; at += pmd) {
        size_t part = size - at < pmd ? size - at : pmd;
        good = pwrite(to, source + at, part, at) == (ssize_t)part;
    }
    if (source)
        munmap(source, size);
    return good;
}

/* Extended attributes; what a directory's default ACL or a security module has
 * given the copy already need not be set, which might be forbidden. */
static bool
copy_attributes(int from, int to)
{
    char names[XATTR_LIST_MAX], value[XATTR_SIZE_MAX], now[XATTR_SIZE_MAX];
    ssize_t length = flistxattr(from, names, sizeof names);

    if (length < 0)
        return errno == ENOTSUP;
    for (char *name = names; name < names + length; name += strlen(name) + 1) {
        ssize_t size = fgetxattr(from, name, value, sizeof value);
        if (size < 0)
            return false;
        if (fgetxattr(to, name, now, sizeof now) == size
            && !memcmp(now, value, size))
            continue;
        if (fsetxattr(to, name, value, size, 0))
            return false;
    }
    return true;
}

/* Give a file without a name that of another.  Only between the two calls is
 * there another one, which a later run removes. */
static bool
put_in_place(int fd, int directory, const char *name)
{
    char link[64];
    const char *between = ".page-primer-warm.new";

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    unlinkat(directory, between, 0);
    return !linkat(AT_FDCWD, link, directory, between, AT_SYMLINK_FOLLOW)
        && !renameat(directory, between, directory, name);
}

/* Returns NULL, or why the file stays as it is: mode, owner, times and
 * extended attributes are kept, or nothing is changed. */
const char *
rewrite(int old, const struct span *span, struct outcome *outcome)
{
    char path[PATH_MAX], *name;
    const char *why = NULL;
    struct stat status;
    struct statx more;
    int new = -1, directory = open_directory(old, path, &name);

    if (directory < 0)
        return "cannot be rewritten: its directory cannot be opened";
    if (fstat(old, &status) || status.st_nlink != 1)
        why = "cannot be rewritten: it has several names";
    else if (status.st_mode & (S_ISUID | S_ISGID))
        why = "cannot be rewritten: it is set-user-ID or set-group-ID";
    else if (!statx(old, "", AT_EMPTY_PATH, STATX_BASIC_STATS, &more)
             && more.stx_attributes & STATX_ATTR_VERITY)
        why = "cannot be rewritten: fs-verity protects it";
    else if ((new = openat(directory, ".", O_TMPFILE | O_RDWR | O_CLOEXEC,
                           S_IRUSR | S_IWUSR))
             < 0)
        why = "cannot be rewritten: its directory is not writable";
    else if (!copy_content(old, new, status.st_size))
        why = "cannot be rewritten: the copy failed (no space, a limit?)";
    if (!why) {
        struct outcome copy = bring_in(new, span);
        struct timespec times[] = {status.st_atim, status.st_mtim};
        fremovexattr(new, "system.posix_acl_access"); /* of the directory */
        if (copy.huge <= outcome->huge)
            why = "not rewritten: the kernel gave the copy no huge page";
        else if (fchown(new, status.st_uid, status.st_gid)
                 || fchmod(new, status.st_mode & 07777)
                 || !copy_attributes(old, new) || futimens(new, times))
            why = "cannot be rewritten: its owner or attributes would be lost";
        else if (fsync(new) || !put_in_place(new, directory, name))
            why = "cannot be rewritten: the copy was not put in its place";
        else
            *outcome = (struct outcome){
                .huge = copy.huge, .done = "rewritten", .why = copy.why};
    }
    if (new >= 0)
        close(new);
    close(directory);
    return why ? why : outcome->why;
}
