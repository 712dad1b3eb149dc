"""Shared libraries that are built for a test."""

import subprocess

from harness.outside import PMD

__all__ = ["BIG", "build", "build_library", "chunks_library"]


def build(tmp_path, name, source, *flags):
    path = tmp_path / name
    (tmp_path / "source.c").write_text(source)
    command = ["gcc", "-O1", "-o", str(path), str(tmp_path / "source.c"), *flags]
    subprocess.run(command, check=True)
    return path


# Five mebibytes of code, spread over whole huge pages at any load address and touched when it is
# loaded, and in their midst a function.
BIG = """
__asm__(".text\\nfilling:\\n.fill 0x300000, 1, 0x90\\n");
int answer(void) { return 42; }
__asm__(".text\\n.fill 0x200000, 1, 0x90\\n");
extern const volatile char filling[] __attribute__((visibility("hidden")));
__attribute__((constructor)) static void touch(void)
{
    for (int i = 0; i < 0x500000; i += 4096)
        (void)filling[i];
}
"""


def build_library(tmp_path, name, *flags):
    return build(tmp_path, name, BIG, "-shared", "-fPIC", "-fno-toplevel-reorder", *flags)


# Code of six huge pages and some, of which touch(n) touches a part of the n-th.
CHUNKS = f"""
__asm__(".text\\nchunks:\\n.fill {7 * PMD}, 1, 0x90\\n");
extern const volatile char chunks[] __attribute__((visibility("hidden")));
unsigned long where(void) {{ return ((unsigned long)chunks + {PMD - 1}) & -{PMD}L; }}
void touch(int n, int bytes)
{{
    for (int i = 0; i < bytes; i += 4096)
        (void)((const volatile char *)where())[n * {PMD} + i];
}}
"""


def chunks_library(directory, *flags):
    """In small pages: written in large pieces its pages could be huge as they are."""
    linked = build(directory, "linked.so", CHUNKS, "-shared", "-fPIC", *flags).read_bytes()
    with open(directory / "libchunks.so", "wb", buffering=0) as file:
        for start in range(0, len(linked), 16384):
            file.write(linked[start : start + 16384])
    return directory / "libchunks.so"
