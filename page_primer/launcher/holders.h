/* page-primer-warm --hold: the process that keeps files in memory. */

#ifndef PAGE_PRIMER_HOLDERS_H
#define PAGE_PRIMER_HOLDERS_H

void become_holder(void);
void end_older_holders(void);

#endif
