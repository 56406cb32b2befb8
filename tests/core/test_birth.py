"""Workers that are made of one process do not share its random numbers."""

import subprocess
import sys

import pytest

# Copies that a snapshot makes have one process id; a fork has another, by which OpenSSL would know it. So original and
# copy are each the first process of a namespace of their own.
COPIED = """if True:
    import ctypes, os, ssl, sys
    from handler.core.birth import Birth

    def apart():
        if ctypes.CDLL(None).unshare(0x20000000):  # CLONE_NEWPID
            sys.exit(77)

    def told_by_child(tell):
        there, here = os.pipe()
        if not os.fork():
            os.write(here, tell())
            os._exit(0)
        os.close(here)
        os.wait()
        return os.read(there, 1 << 10)

    def drawn():
        assert os.getpid() == 1
        return f"{ssl.RAND_bytes(8).hex()} ".encode()

    def copy():
        if sys.argv[1] == "anew":
            Birth.anew()
        return drawn()

    def original():
        ssl.RAND_bytes(8)
        apart()
        return told_by_child(copy) + drawn()

    apart()
    print(told_by_child(original).decode())
"""


def drawn_by_copy_and_original(how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", COPIED, how], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("namespaces of processes may not be made here")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_copy_of_a_process_makes_the_keys_that_the_original_makes() -> None:
    copy, original = drawn_by_copy_and_original("as it is")
    assert copy == original


def test_one_that_is_born_anew_does_not() -> None:
    copy, original = drawn_by_copy_and_original("anew")
    assert copy != original
