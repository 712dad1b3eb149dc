/* page-primer-warm: bring aligned files into memory on huge pages, then
 * execute a command.
 *
 * A program of its own, because an interpreter maps the very pages that may
 * have to be dropped from the cache, and for its start, which takes a
 * millisecond.  Whatever happens to a file, the command is executed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "warm.h"

enum { DEFAULT_PMD = 2 << 20 };

static const char usage[] =
    "usage: page-primer-warm [-q | -v] [--hold] [--rewrite] [--list FILE]\n"
    "                        [PATH ...] [-- COMMAND ARG ...]\n"
    "\n"
    "Brings the code of files that `page-primer align` aligned into memory\n"
    "on huge pages, then executes COMMAND. Without a PATH: those recorded in\n"
    "$PAGE_PRIMER_ALIGNED, or else /var/lib/page-primer/aligned and\n"
    "${XDG_STATE_HOME:-~/.local/state}/page-primer/aligned.\n"
    "\n"
    "  -q           print nothing about files\n"
    "  -v           print a line about each file before COMMAND, too\n"
    "  --hold       leave a process that keeps them in memory (mlock)\n"
    "  --rewrite    rewrite a file that others map in small pages\n"
    "  --list FILE  read absolute paths from FILE, one a line\n"
    "\n"
    "Exit status: 0 all on huge pages, 1 not all, 2 usage; or COMMAND's.\n";

/* Warm one file and print a line about it, unless that is not wanted. */
static bool
warm(const char *path, bool may_rewrite, FILE *failures, FILE *successes)
{
    struct span span;
    struct outcome outcome = {0, false, NULL, NULL};
    int fd = open_target(path, &span, &outcome.why);

    if (fd < 0) {
        if (failures)
            fprintf(failures, "%s: not warmed: %s\n", path, outcome.why);
        return false;
    }
    outcome = bring_in(fd, &span);
    if (outcome.held && may_rewrite)
        outcome.why = rewrite(fd, &span, &outcome);
    close(fd);
    bool good = outcome.huge == span.length;
    FILE *to = good ? successes : failures;
    if (to)
        fprintf(to, "%s: %zu of %zu KiB on huge pages%s%s%s%s\n", path,
                outcome.huge >> 10, span.length >> 10,
                outcome.done ? ", " : "", outcome.done ? outcome.done : "",
                good || !outcome.why ? "" : ": ",
                good || !outcome.why ? "" : outcome.why);
    return good;
}

/* Where the kernel does not tell, it has no huge pages to look for. */
static void
read_page_size(void)
{
    const char *name = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size";
    FILE *file = fopen(name, "re");

    if (file && (fscanf(file, "%zu", &pmd) != 1 || !pmd))
        pmd = DEFAULT_PMD;
    if (file)
        fclose(file);
}

/* Returns false. */
static bool
complain(const char *name)
{
    fprintf(stderr, "page-primer-warm: %s: %s\n", name, strerror(errno));
    return false;
}

/* Returns the exit status, as a shell's. */
static int
execute(char **command)
{
    execvp(*command, command);
    int error = errno;
    complain(*command);
    return error == ENOENT || error == ENOTDIR ? 127 : 126;
}

typedef struct {
    bool quiet, verbose, keep, may_rewrite;
    bool listed, good; /* lists were named, and could be read */
    char **command;    /* or NULL */
} options;

/* Returns -1, or the exit status where there is nothing more to do. */
static int
parse(int argc, char **argv, options *given)
{
    int at;

    for (at = 1; at < argc && strcmp(argv[at], "--"); at++) {
        const char *word = argv[at];
        if (!strcmp(word, "-q"))
            given->quiet = true;
        else if (!strcmp(word, "-v"))
            given->verbose = true;
        else if (!strcmp(word, "--hold"))
            given->keep = true;
        else if (!strcmp(word, "--rewrite"))
            given->may_rewrite = true;
        else if (!strcmp(word, "--list") && at + 1 < argc) {
            given->listed = true;
            given->good &= add_list(argv[++at]) || complain(argv[at]);
        } else if (!strcmp(word, "--help"))
            return fputs(usage, stdout) < 0;
        else if (*word == '-')
            return fputs(usage, stderr), 2;
        else
            add_file(argv[at]);
    }
    given->command = at + 1 < argc ? argv + at + 1 : NULL;
    return -1;
}

int
main(int argc, char **argv)
{
    options given = {.good = true};
    int fd, status;

    /* What we open is never taken for stdio that is closed. */
    while ((fd = open("/dev/null", O_RDWR | O_CLOEXEC)) >= 0 && fd < 3)
        ;
    close(fd);
    read_page_size();
    if (argc && !strcmp(argv[0], HOLDER))
        return hold(argv + 1);
    status = parse(argc, argv, &given);
    if (status >= 0)
        return status;

    /* A closed pipe or `ulimit -f` must not end it; COMMAND finds both signals
     * as they were. */
    void (*pipe)(int) = signal(SIGPIPE, SIG_IGN);
    void (*limit)(int) = signal(SIGXFSZ, SIG_IGN);
    char **holder = arguments_of_holder();
    bool good = given.good;
    if (!given.listed && !holder[1])
        good = add_recorded() || complain(getenv("PAGE_PRIMER_ALIGNED"));
    FILE *failures = given.quiet ? NULL : given.command ? stderr : stdout;
    for (char **file = holder + 1; *file; file++)
        good &= warm(*file, given.may_rewrite, failures,
                     given.verbose || !given.command ? failures : NULL);
    if (failures)
        fflush(failures);
    if (given.keep && holder[1])
        good &= leave_holder(holder);
    signal(SIGPIPE, pipe);
    signal(SIGXFSZ, limit);
    return given.command ? execute(given.command) : !good;
}
