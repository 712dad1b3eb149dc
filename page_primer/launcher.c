/* page-primer: the command.
 *
 * `page-primer run COMMAND...` is in the way of every start of a server, so what can be done without
 * an interpreter is done here: find the interpreter that the command leads to, read what was found
 * out about it (its start record, page_primer/starts.py), and execute its image. Everything else, and
 * every doubt, is for the Python command `page-primer-cli` beside this file.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

enum { NO_HOLDS = 600, DEEPEST = 4, LONGEST = 16384 };

extern char **environ;

static char own[PATH_MAX]; /* this file */

/* A command as the kernel would run it: the program, `#!` lines followed, and its argv. */
struct command {
    char program[PATH_MAX];
    char name[PATH_MAX]; /* of the process, as the kernel would set it */
    char **arguments;
};

struct record {
    char text[LONGEST];
    char *how, *what, *identity, *library, *library_identity;
    unsigned long offset, length;
};

static void *allocate(size_t size)
{
    void *memory = malloc(size);
    if (!memory)
        _exit(126);
    return memory;
}

static char **prepend(char **arguments, char *one, char *two, char *three)
{
    size_t count = 0, at = 0;
    while (arguments[count])
        count++;
    char **all = allocate((count + 4) * sizeof *all);
    for (char **word = (char *[]){one, two, three, NULL}; *word; word++)
        all[at++] = *word;
    memcpy(all + at, arguments, (count + 1) * sizeof *all);
    return all;
}

/* The interpreter that an installation's script names; NULL where that is not to be seen, or where
 * PYTHONPATH may be what leads it to our package (`pip install --target`). */
static char *interpreter_of(const char *script)
{
    static char line[PATH_MAX];
    char package[PATH_MAX + 32];
    snprintf(package, sizeof package, "%s/../page_primer", dirname(strdupa(own)));
    FILE *file = fopen(script, "re");
    bool plain = file && fgets(line, sizeof line, file) && !strncmp(line, "#!/", 3) &&
                 strchr(line, '\n') && !strpbrk(line, " \t") && access(package, F_OK);
    if (file)
        fclose(file);
    line[strcspn(line, "\r\n")] = 0;
    return plain && !strncmp(basename(strdupa(line)), "python", 6) ? line + 2 : NULL;
}

static bool is_ignored(int number)
{
    struct sigaction action;
    return !sigaction(number, NULL, &action) && action.sa_handler == SIG_IGN;
}

/* Hand over to the Python command, whose interpreter has no part in what PYTHONPATH, PYTHONHOME and
 * the like say: they are set for the program that is to be run, which may be of another version. */
static void leave_to_python(char **argv)
{
    char path[PATH_MAX + 8], ignored[32];
    snprintf(path, sizeof path, "%s-cli", own);
    setenv("PAGE_PRIMER_LAUNCHER", own, 1);
    /* An interpreter ignores these, and what it executes would inherit it. */
    snprintf(ignored, sizeof ignored, "%s %s", is_ignored(SIGPIPE) ? "SIGPIPE" : "",
             is_ignored(SIGXFSZ) ? "SIGXFSZ" : "");
    setenv("PAGE_PRIMER_IGNORED", ignored, 1);
    char *interpreter = interpreter_of(path);
    char *option = getenv("PYTHONDONTWRITEBYTECODE") ? "-EB" : "-E";
    if (interpreter)
        execv(interpreter, prepend(argv + 1, interpreter, option, path));
    execv(path, argv);
    fprintf(stderr, "page-primer: %s: %s\n", path, strerror(errno));
    exit(126);
}

static bool find(const char *name, char *path)
{
    struct stat status;
    if (strchr(name, '/'))
        return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX && !access(path, X_OK) &&
               !stat(path, &status) && S_ISREG(status.st_mode);
    const char *at = getenv("PATH");
    while (at) {
        const char *end = strchrnul(at, ':'); /* an empty entry is the current directory */
        const char *slash = end > at ? "/" : "";
        if (snprintf(path, PATH_MAX, "%.*s%s%s", (int)(end - at), at, slash, name) < PATH_MAX &&
            !access(path, X_OK) && !stat(path, &status) && S_ISREG(status.st_mode))
            return true;
        at = *end ? end + 1 : NULL;
    }
    return false;
}

static bool read_file(const char *path, char *text, size_t size, struct stat *status)
{
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return false;
    ssize_t got = fstat(fd, status) || !S_ISREG(status->st_mode) ? -1 : read(fd, text, size - 1);
    close(fd);
    if (got < 0)
        return false;
    text[got] = 0;
    return true;
}

/* Follow a command to the program that runs it. */
static bool resolve(char **argv, struct command *command)
{
    if (!find(argv[0], command->program))
        return false;
    snprintf(command->name, sizeof command->name, "%s", basename(strdupa(command->program)));
    command->arguments = argv;
    for (int depth = 0; depth < DEEPEST; depth++) {
        char line[257] = "";
        int fd = open(command->program, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return false;
        ssize_t got = read(fd, line, sizeof line - 1);
        close(fd);
        if (got < 2 || line[0] != '#' || line[1] != '!')
            return true;
        char *end = memchr(line, '\n', got);
        if (!end || memchr(line, 0, end - line))
            return false;
        *end = 0;
        char *interpreter = strtok(line + 2, " \t"), *option = strtok(NULL, "");
        if (!interpreter)
            return false;
        if (option) {
            option += strspn(option, " \t");
            for (char *last = option + strlen(option); last > option && strchr(" \t", last[-1]);)
                *--last = 0;
            if (!*option)
                option = NULL;
        }
        char *script = strdup(command->program);
        interpreter = strdup(interpreter);
        option = option ? strdup(option) : NULL;
        char **rest = command->arguments + 1;
        if (option && !strcmp(basename(strdupa(interpreter)), "env")) {
            if (*option == '-' || strpbrk(option, " \t=") || !find(option, command->program))
                return false;
            snprintf(command->name, sizeof command->name, "%s",
                     basename(strdupa(command->program)));
            command->arguments = prepend(rest, option, script, NULL);
            continue;
        }
        if (strlen(interpreter) >= PATH_MAX)
            return false;
        strcpy(command->program, interpreter);
        command->arguments = option ? prepend(rest, interpreter, option, script)
                                    : prepend(rest, interpreter, script, NULL);
    }
    return false;
}

/* Whether options keep an interpreter from importing sitecustomize: starts.is_isolated(). */
static bool is_isolated(char **arguments)
{
    for (char **word = arguments + 1; *word; word++) {
        const char *at = *word;
        if (at[0] != '-' || !at[1] || !strcmp(at, "--"))
            return false;
        if (at[1] == '-') {
            if (!strcmp(at, "--check-hash-based-pycs") && !*++word)
                return false;
            continue;
        }
        while (*++at) {
            if (strchr("EIS", *at))
                return true;
            if (strchr("cm", *at))
                return false;
            if (strchr("WX", *at)) { /* the rest is its argument, or the next word */
                if (!at[1] && !*++word)
                    return false;
                break;
            }
        }
    }
    return false;
}

static void identity_of(const struct stat *status, char *text, size_t size)
{
    snprintf(text, size, "%llx-%llx-%llx-%llx-%llx", (unsigned long long)status->st_dev,
             (unsigned long long)status->st_ino, (unsigned long long)status->st_size,
             status->st_mtim.tv_sec * 1000000000ULL + status->st_mtim.tv_nsec,
             status->st_ctim.tv_sec * 1000000000ULL + status->st_ctim.tv_nsec);
}

static bool trusted(const struct stat *status)
{
    return (status->st_uid == 0 || status->st_uid == geteuid()) && !(status->st_mode & 022);
}

static char *next_line(char **at)
{
    return *at ? strsep(at, "\n") : NULL;
}

static bool read_record(const char *path, struct record *record, bool *no)
{
    struct stat status, there;
    char identity[128];
    if (!read_file(path, record->text, sizeof record->text, &status) || !trusted(&status))
        return false;
    char *at = record->text, *form = next_line(&at);
    if (!form || strcmp(form, "page-primer 1"))
        return false;
    record->how = next_line(&at);
    record->what = next_line(&at);
    record->identity = next_line(&at);
    record->library = next_line(&at);
    record->library_identity = next_line(&at);
    char *extent = next_line(&at);
    if (!extent || sscanf(extent, "%lx %lx", &record->offset, &record->length) != 2)
        return false;
    *no = !strcmp(record->how, "no");
    if (*no) {
        time_t age = time(NULL) - status.st_mtime;
        return age >= 0 && age < NO_HOLDS;
    }
    if (stat(record->what, &there) || !trusted(&there))
        return false;
    snprintf(identity, sizeof identity, "%llx-%llx-%llx", (unsigned long long)there.st_dev,
             (unsigned long long)there.st_ino, (unsigned long long)there.st_size);
    if (strcmp(identity, record->identity))
        return false;
    if (strcmp(record->how, "preload"))
        return !strcmp(record->how, "exec");
    /* With a search path of its own this process may be given another library. */
    if (getenv("LD_LIBRARY_PATH") || stat(record->library, &there))
        return false;
    identity_of(&there, identity, sizeof identity);
    return !strcmp(identity, record->library_identity);
}

/* Bytes of the mapping at an address that are on huge pages, by the kernel's own account. */
static unsigned long huge_at(const char *address)
{
    FILE *file = fopen("/proc/self/smaps", "re");
    char line[PATH_MAX + 128];
    unsigned long sum = 0, start, end, kilobytes;
    bool here = false;
    while (file && fgets(line, sizeof line, file)) {
        if (sscanf(line, "%lx-%lx ", &start, &end) == 2)
            here = start == (unsigned long)address;
        else if (here && (sscanf(line, "FilePmdMapped: %lu", &kilobytes) == 1 ||
                          sscanf(line, "ShmemPmdMapped: %lu", &kilobytes) == 1))
            sum += kilobytes << 10;
    }
    if (file)
        fclose(file);
    return sum;
}

/* Have the image's pages in memory as huge ones, as a mapping of it will find them. */
static bool is_huge(const struct record *record)
{
    unsigned long pmd = 0;
    FILE *setting = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
    if (!setting || fscanf(setting, "%lu", &pmd) != 1 || !pmd || record->offset % pmd)
        return false;
    fclose(setting);
    int fd = open(record->what, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    size_t room = record->length + 2 * pmd;
    char *reserved = mmap(NULL, room, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (reserved == MAP_FAILED)
        return false;
    char *aligned = (char *)(((uintptr_t)reserved + pmd - 1) & -pmd);
    char *there = mmap(aligned, record->length, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED, fd,
                       (off_t)record->offset);
    close(fd);
    if (there == MAP_FAILED)
        return false;
    madvise(there, record->length, MADV_HUGEPAGE);
    madvise(there, record->length, MADV_POPULATE_READ);
    if (huge_at(there) == record->length)
        return true;
    madvise(there, record->length, MADV_COLLAPSE);
    return huge_at(there) == record->length;
}

/* Where records may be, as page_primer/store.py has it; the last is NULL. */
static char **directories(void)
{
    static char *found[7];
    const char *wanted = getenv("PAGE_PRIMER_IMAGE_DIR"), *cache = getenv("XDG_CACHE_HOME"),
               *home = getenv("HOME"), *runtime = getenv("XDG_RUNTIME_DIR");
    int count = 0;
    unsigned user = geteuid();
    if (wanted && *wanted)
        found[count++] = (char *)wanted;
    if (!user)
        found[count++] = "/var/cache/page-primer";
    if (cache && *cache ? *cache == '/' && asprintf(&found[count], "%s/page-primer", cache) > 0
                        : home && asprintf(&found[count], "%s/.cache/page-primer", home) > 0)
        count++;
    if (asprintf(&found[count], "/var/tmp/page-primer-%u", user) > 0)
        count++;
    if (asprintf(&found[count], "/dev/shm/page-primer-%u", user) > 0)
        count++;
    if (runtime && *runtime && asprintf(&found[count], "%s/page-primer", runtime) > 0)
        count++;
    return found;
}

/* Whether a directory of records is no one else's to write to. */
static bool is_ours(const char *directory)
{
    char folder[PATH_MAX + 16];
    struct stat status;
    snprintf(folder, sizeof folder, "%s/.starts", directory);
    return !stat(directory, &status) && trusted(&status) && !lstat(folder, &status) &&
           S_ISDIR(status.st_mode) && trusted(&status);
}

/* Where a store was named, images are to be in that one, and reasons are of that one. */
static bool is_wanted(const struct record *record, bool no, const char *directory)
{
    const char *wanted = getenv("PAGE_PRIMER_IMAGE_DIR");
    size_t length = wanted ? strlen(wanted) : 0;
    if (!length)
        return true;
    while (length > 1 && wanted[length - 1] == '/')
        length--;
    return no ? directory == wanted
              : !strncmp(record->what, wanted, length) && record->what[length] == '/';
}

/* Put our sitecustomize first on PYTHONPATH; false where it is there already, but not first. */
static bool add_site(const char *site)
{
    const char *old = getenv("PYTHONPATH");
    size_t length = strlen(site);
    char *paths;
    if (!old || !*old)
        return !setenv("PYTHONPATH", site, 1);
    if (!strncmp(old, site, length) && (old[length] == ':' || !old[length]))
        return true;
    if (strstr(old, site) || asprintf(&paths, "%s:%s", site, old) < 0)
        return false;
    return !setenv("PYTHONPATH", paths, 1);
}

/* Execute a command as its record says; return where anything is in doubt. */
static void run(char **argv)
{
    struct command command;
    struct record record;
    struct stat status;
    char program[128], self[128], path[PATH_MAX + 320], site[PATH_MAX] = "", started[PATH_MAX + 32];
    bool no = false, known = false;
    if (stat(own, &status))
        return;
    identity_of(&status, self, sizeof self);
    if (geteuid() != getuid() || getegid() != getgid() || prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0))
        return;
    if (!resolve(argv, &command) || is_isolated(command.arguments) ||
        stat(command.program, &status))
        return;
    identity_of(&status, program, sizeof program);
    for (char **directory = directories(); *directory && !(known && *site); directory++) {
        if (!is_ours(*directory))
            continue;
        if (!known) {
            snprintf(path, sizeof path, "%s/.starts/%s", *directory, program);
            known = read_record(path, &record, &no) && is_wanted(&record, no, *directory);
        }
        if (!*site) {
            snprintf(path, sizeof path, "%s/.starts/launcher-%s", *directory, self);
            if (!read_file(path, site, sizeof site, &status) || !trusted(&status))
                *site = 0;
        }
    }
    site[strcspn(site, "\n")] = 0;
    if (!known || !*site || stat(site, &status) || (!no && !is_huge(&record)) || !add_site(site))
        return;
    if (no) {
        execvp(argv[0], argv);
        return;
    }
    snprintf(started, sizeof started, "%d %s", getpid(), command.name);
    setenv("PAGE_PRIMER_STARTED", started, 1);
    if (!strcmp(record.how, "exec")) {
        execv(record.what, command.arguments);
    } else {
        const char *others = getenv("LD_PRELOAD");
        const char *first = others && *others ? others : "";
        char *preload;
        if (asprintf(&preload, "%s%s%s", first, *first ? ":" : "", record.what) > 0 &&
            !setenv("LD_PRELOAD", preload, 1))
            execv(command.program, command.arguments);
        if (others)
            setenv("LD_PRELOAD", others, 1);
        else
            unsetenv("LD_PRELOAD");
    }
    unsetenv("PAGE_PRIMER_STARTED");
}

/* Whether nothing but the image directory is set: what the rest means is options.py's to say. */
static bool plainly_set(void)
{
    for (char **variable = environ; *variable; variable++)
        if (!strncmp(*variable, "PAGE_PRIMER", 11) &&
            strncmp(*variable, "PAGE_PRIMER_IMAGE_DIR=/", 23) != 0)
            return false;
    return true;
}

int main(int argc, char **argv)
{
    ssize_t length = readlink("/proc/self/exe", own, sizeof own - 1);
    if (length > 0)
        own[length] = 0;
    else if (!argc || !find(argv[0], own)) { /* no /proc */
        fprintf(stderr, "page-primer: /proc/self/exe: %s\n", strerror(errno));
        return 126;
    }
    if (length > 0 && argc > 2 && !strcmp(argv[1], "run")) {
        char **command = argv + 2 + !strcmp(argv[2], "--");
        if (*command && **command && (command > argv + 2 || **command != '-') && plainly_set())
            run(command);
    }
    leave_to_python(argv);
}
