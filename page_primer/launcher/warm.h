/* page-primer-warm: which files (lists.c), what of one can be huge (span.c),
 * its pages (pages.c), one written anew (rewrite.c), their holder (hold.c). */
#ifndef PAGE_PRIMER_WARM_H
#define PAGE_PRIMER_WARM_H

#include <stdbool.h>
#include <sys/types.h>

#define HOLDER "page-primer-hold"

/* The whole huge pages of an aligned file's code. */
struct span {
    off_t offset;
    size_t length;
};

/* What came of it: bytes on huge pages, what was done, and why that did not
 * suffice (static strings or NULL). */
struct outcome {
    size_t huge;
    bool held; /* other processes map small pages of it */
    const char *done, *why;
};

bool
add_file(char *path);
bool
add_list(const char *name);
bool
add_recorded(void);
char **
arguments_of_holder(void);

extern size_t pmd; /* bytes of a huge page */

int
open_target(const char *path, struct span *span, const char **why);
char *
map_range(int fd, off_t offset, size_t length);

struct outcome
bring_in(int fd, const struct span *span);
const char *
rewrite(int old, const struct span *span, struct outcome *outcome);

int
hold(char **paths);
bool
leave_holder(char **arguments);

#endif
