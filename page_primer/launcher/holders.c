/* page-primer-warm --hold: how its process is known, and the end of those whose
 * files a new one holds. */
#define _GNU_SOURCE
#include "holders.h"

#include <dirent.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define HOLDER "primer-hold" /* as in /proc/PID/comm */

/* With a name, in a session of its own, and to be ended by SIGTERM whatever our
 * caller ignores. */
void
become_holder(void)
{
    sigset_t none;

    prctl(PR_SET_NAME, HOLDER);
    setsid();
    signal(SIGTERM, SIG_DFL);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

/* The next path of a file that /proc/PID/maps has, as it was before the file
 * was replaced; NULL at the end. */
static const char *
next_path(FILE *maps, char *line, int size)
{
    static const char deleted[] = " (deleted)";
    const size_t tail = sizeof deleted - 1;

    while (fgets(line, size, maps)) {
        char *path = strchr(line, '/');
        if (!path)
            continue;
        path[strcspn(path, "\n")] = 0;
        size_t length = strlen(path);
        if (length > tail && !strcmp(path + length - tail, deleted))
            path[length - tail] = 0;
        return path;
    }
    return NULL;
}

static bool
is_mapped_here(const char *wanted)
{
    char line[PATH_MAX + 128];
    FILE *maps = fopen("/proc/self/maps", "re");
    bool found = false;

    for (const char *path; maps && !found;) {
        path = next_path(maps, line, sizeof line);
        if (!path)
            break;
        found = !strcmp(path, wanted);
    }
    if (maps)
        fclose(maps);
    return found;
}

/* Whether a process maps nothing but what is mapped here. */
static bool
is_superseded(const char *pid)
{
    char name[64], line[PATH_MAX + 128];
    bool covered = true;

    snprintf(name, sizeof name, "/proc/%s/maps", pid);
    FILE *maps = fopen(name, "re");
    if (!maps)
        return false;
    int paths = 0;
    for (const char *path; covered; paths++) {
        path = next_path(maps, line, sizeof line);
        if (!path)
            break;
        covered = is_mapped_here(path);
    }
    fclose(maps);
    return covered && paths;
}

/* A process of this user's that is called as holders are. */
static bool
is_holder(const char *pid)
{
    char name[64], called[32] = "";
    struct stat status;

    snprintf(name, sizeof name, "/proc/%s/comm", pid);
    FILE *comm = fopen(name, "re");
    if (!comm)
        return false;
    bool same = fgets(called, sizeof called, comm)
        && !strcmp(called, HOLDER "\n") && !fstat(fileno(comm), &status)
        && status.st_uid == geteuid();
    fclose(comm);
    return same;
}

/* End this user's other holders that hold nothing but what is held here, by
 * path: of a file that was replaced since, they hold the old one. */
void
end_older_holders(void)
{
    DIR *processes = opendir("/proc");

    if (!processes)
        return;
    for (struct dirent *entry; (entry = readdir(processes));) {
        const long pid = strtol(entry->d_name, NULL, 10);
        if (pid > 1 && pid != getpid() && is_holder(entry->d_name)
            && is_superseded(entry->d_name))
            kill((pid_t)pid, SIGTERM);
    }
    closedir(processes);
}
