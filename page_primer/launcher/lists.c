/* Which files page-primer-warm is to bring into memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "warm.h"

enum { MOST_FILES = 4096 }; /* more than that are left alone */

static char *files[MOST_FILES + 2] = {HOLDER}; /* as the holder's argv */
static int count = 1;

/* Returns false where there is no room for it. */
bool
add_file(char *path)
{
    bool room = path && count <= MOST_FILES;

    if (room)
        files[count++] = path;
    return room;
}

char **
arguments_of_holder(void)
{
    return files;
}

/* Add the absolute paths in a file, one a line; other lines are passed over.
 * Returns false where it cannot be read. */
bool
add_list(const char *name)
{
    char line[PATH_MAX + 1];
    struct stat status;
    int fd = open(name, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    bool good = fd >= 0 && !fstat(fd, &status) && S_ISREG(status.st_mode);
    FILE *file = good ? fdopen(fd, "r") : NULL;

    for (int i = 0; file && i < MOST_FILES; i++) {
        if (!fgets(line, sizeof line, file))
            break;
        line[strcspn(line, "\n")] = 0;
        if (*line != '/')
            continue;
        char *path = strdup(line);
        if (!add_file(path))
            free(path);
    }
    if (file)
        fclose(file);
    else if (fd >= 0) {
        close(fd);
        errno = EINVAL;
    }
    return file != NULL;
}

/* Add what `page-primer align` has recorded for root and for this user. */
bool
add_recorded(void)
{
    const char *named = getenv("PAGE_PRIMER_ALIGNED"), *home = getenv("HOME");
    const char *state = getenv("XDG_STATE_HOME");
    char path[PATH_MAX];

    if (named && *named)
        return add_list(named);
    add_list("/var/lib/page-primer/aligned");
    if (!state || *state != '/')
        snprintf(path, sizeof path, "%s/.local/state/page-primer/aligned",
                 home ? home : "");
    else
        snprintf(path, sizeof path, "%s/page-primer/aligned", state);
    if (geteuid())
        add_list(path);
    return true;
}
