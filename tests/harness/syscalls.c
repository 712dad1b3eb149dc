/* syscalls FILE COMMAND...: run a command, and write to FILE the numbers of the
 * system calls that it makes between prctl(0x70700001) and prctl(0x70700002),
 * one a line.  (strace would do, but is rarely there.)
 */

#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/ptrace.h>

#define BEGIN 0x70700001
#define END 0x70700002
#define HIGHEST 4096

int
main(int argc, char **argv)
{
    static char seen[HIGHEST];
    struct ptrace_syscall_info info;
    int status, recording = 0;
    FILE *out;
    pid_t child;

    if (argc < 3)
        return 125;
    child = fork();
    if (child == 0) {
        ptrace(PTRACE_TRACEME, 0, NULL, NULL);
        raise(SIGSTOP);
        execvp(argv[2], argv + 2);
        _exit(127);
    }
    if (child < 0 || waitpid(child, &status, 0) < 0)
        return 125;
    ptrace(PTRACE_SETOPTIONS, child, NULL,
           (void *)(long)(PTRACE_O_TRACESYSGOOD | PTRACE_O_EXITKILL));
    ptrace(PTRACE_SYSCALL, child, NULL, NULL);
    while (waitpid(child, &status, 0) == child && WIFSTOPPED(status)) {
        long signal = WSTOPSIG(status);
        if (signal == (SIGTRAP | 0x80)) {
            signal = 0;
            if (ptrace(PTRACE_GET_SYSCALL_INFO, child, (void *)sizeof(info),
                       &info)
                < 0)
                return 125;
            if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
                if (info.entry.nr == SYS_prctl && info.entry.args[0] == BEGIN)
                    recording = 1;
                else if (info.entry.nr == SYS_prctl
                         && info.entry.args[0] == END)
                    recording = 0;
                else if (recording && info.entry.nr < HIGHEST)
                    seen[info.entry.nr] = 1;
            }
        } else if (signal == SIGTRAP) {
            signal = 0; /* of the execve */
        }
        ptrace(PTRACE_SYSCALL, child, NULL, (void *)signal);
    }
    out = fopen(argv[1], "w");
    if (out == NULL)
        return 125;
    for (int i = 0; i < HIGHEST; i++)
        if (seen[i])
            fprintf(out, "%d\n", i);
    return fclose(out) == 0 && WIFEXITED(status) ? WEXITSTATUS(status) : 125;
}
