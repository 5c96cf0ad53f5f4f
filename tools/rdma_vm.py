#!/usr/bin/env python3
"""Runs a command in a small virtual machine that has RDMA: Debian's stock kernel under emulation, with Soft-RoCE.

    tools/rdma_vm.py --prepare
    tools/rdma_vm.py [--installed] [--timeout S] [--mem MIB] [--times] [--instructions] -- COMMAND [ARG...]

The guest's root is this machine's, so whatever is installed here is there (writes are lost, but for the current
folder). It has two cards, rxe0 and rxe1, on the two ends of a pair of virtual Ethernet devices, rdma0 (10.77.0.1) and
rdma1 (10.77.0.2), and no other network: `tc qdisc add dev rdma0 root netem loss 5%` loses packets between them. Output
and exit status are the command's; 124: it ran out of time; 125: the guest failed, its console is on standard error;
77: it cannot run on this machine, with the reason.

With --instructions the guest's clock counts what its processor executes, a nanosecond each: what is timed there is the
same beside any other work of this machine, and so are ratios. It takes longer.

Needs an x86-64 Debian and, once, root: it installs qemu and what else it needs, and unpacks a kernel into
~/.cache/msi-rdma-vm (330 MB). Boots in 5 to 9 s. Its emulated processor is 20 to 40 times slower than the real one: it
shows that something is right, never how fast it is.
"""

from __future__ import annotations

import argparse
import glob
import lzma
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "msi-rdma-vm"
VERSION = "1"  # of what is in there
PACKAGES = {  # and a file that says that one is installed
    "qemu-system-x86": "/usr/bin/qemu-system-x86_64",
    "kmod": "/sbin/depmod",
    "busybox-static": "/bin/busybox",
    "iproute2": "/sbin/ip",
    "ibverbs-providers": "/etc/libibverbs.d/rxe.driver",
    "python3-pyverbs": "/usr/lib/python3/dist-packages/pyverbs/__init__.py",
}
CANNOT, TIMED_OUT, FAILED = 77, 124, 125
BOOT_S = 60.0
COUNTED_BOOT_S = 240.0  # while instructions are counted
BOOT_TRIES = 3
BOOT_MODULES = ("virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay")
RDMA_MODULES = ("veth", "crc32_generic", "ib_uverbs", "rdma_rxe")
JUNK = ("sound", "drivers/gpu", "drivers/media", "drivers/staging", "drivers/iio", "drivers/usb", "drivers/hid")

INIT = r"""#!/bin/busybox sh
B=/bin/busybox
export PATH=/sbin:/bin
$B mount -t proc proc /proc; $B mount -t sysfs sysfs /sys; $B mount -t devtmpfs dev /dev
die() { echo "rdma-vm: FATAL: $*" > /dev/kmsg; $B sleep 0.2; $B reboot -f; }
load() { for m in $($B cat /mod/$1); do $B insmod /mod/$m || die "insmod $m"; done; }
load boot
o=trans=virtio,version=9p2000.L,msize=524288
$B mount -t 9p -o $o,cache=none ctl /ctl || die "no control folder"
. /ctl/vars
/sbin/ip link set lo up
load rdma
/sbin/ip link add rdma0 mtu 4200 type veth peer name rdma1 mtu 4200 || die "no veth"
for i in 0 1; do
  # both ends are in one namespace: each answers for itself alone, and takes our own addresses
  s=/proc/sys/net/ipv4/conf/rdma$i
  echo 1 > $s/accept_local; echo 0 > $s/rp_filter; echo 1 > $s/arp_ignore; echo 2 > $s/arp_announce
  /sbin/ip addr add 10.77.0.$((i+1))/24 dev rdma$i
  /sbin/ip link set rdma$i up
done
echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
for i in 0 1; do /sbin/rdma link add rxe$i type rxe netdev rdma$i || die "no rxe$i"; done
$B mount -t 9p -o $o,ro,cache=loose root /lower || die "no root"
$B mount -t tmpfs -o size=75% rw /rw
$B mkdir /rw/u /rw/w
$B mount -t overlay -o lowerdir=/lower,upperdir=/rw/u,workdir=/rw/w root /new || die "no overlay"
$B mkdir -p "/new$HERE"
$B mount -t 9p -o $o,cache=mmap here "/new$HERE" || die "no current folder"
$B mkdir -p /new/lib/modules
$B mount --bind "/lower$KERNEL/lib/modules" /new/lib/modules
n=0  # GIDs come a little later than the devices
while [ $n -lt 200 ]; do
  c=$($B cat /sys/class/infiniband/rxe*/ports/1/gids/[01] 2>/dev/null | $B grep -c :ffff:0a4d:)
  [ "$c" -ge 2 ] && break
  $B usleep 20000; n=$((n+1))
done
for d in proc sys dev; do $B mkdir -p /new/$d; $B mount --move /$d /new/$d; done
$B mkdir -p /new/dev/shm /new/dev/pts /new/run
$B mount -t tmpfs -o size=50% shm /new/dev/shm; $B mount -t devpts pts /new/dev/pts; $B mount -t tmpfs run /new/run
$B mkdir -p /new/run/ctl
$B mount --move /ctl /new/run/ctl
exec $B chroot /new /bin/sh /run/ctl/stage2
"""

STAGE2 = r"""
B=/bin/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ln -sfn /proc/self/fd /dev/fd; ln -sfn fd/0 /dev/stdin; ln -sfn fd/1 /dev/stdout; ln -sfn fd/2 /dev/stderr
ulimit -l unlimited; ulimit -n 65536
for p in /sys/class/virtio-ports/*; do
  read n < $p/name
  case "$n" in out) OUT=/dev/${p##*/};; err) ERR=/dev/${p##*/};; esac
done
$B mkfifo /run/.out /run/.err
$B cat /run/.out > $OUT & c1=$!
$B cat /run/.err > $ERR & c2=$!
echo "rdma-vm: run" > /dev/kmsg
$B setsid /bin/sh /run/ctl/command </dev/null >/run/.out 2>/run/.err &
wait $!
rc=$?
( $B sleep 5; kill $c1 $c2 ) 2>/dev/null &  # a process that was left behind may hold them
wait $c1 $c2
echo $rc > /run/ctl/status.new
$B mv /run/ctl/status.new /run/ctl/status
$B sync
$B reboot -f
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of boot and command (300)")
    parser.add_argument("--mem", type=int, default=512, metavar="MIB", help="memory of the guest (512)")
    parser.add_argument("--prepare", action="store_true", help="install what it needs, and nothing else")
    parser.add_argument("--installed", action="store_true", help="install nothing: without what it needs, say so")
    parser.add_argument("--times", action="store_true", help="say on standard error what took how long")
    parser.add_argument("--instructions", action="store_true", help="its clock counts instructions")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    given = parser.parse_args()
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command and not given.prepare:
        parser.error("no COMMAND")
    began = time.monotonic()
    prepare(may_install=not given.installed)
    if given.prepare:
        return 0
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="msi-rdma-vm.") as folder:
        control = Path(folder)
        write_control(control, command)
        prepared = time.monotonic()
        machine = Machine(control, given.mem, counts_instructions=given.instructions)
        status = machine.run(prepared + given.timeout)
        if given.times:
            note(f"prepared in {prepared - began:.1f} s, ran for {time.monotonic() - prepared:.1f} s, of which "
                 f"{machine.boot_s:.1f} s for the boot")  # fmt: skip
    return status


# -- what it needs ----------------------------------------------------------------------------------------------------


def prepare(may_install: bool) -> None:
    """Ends the program where this machine cannot do it."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        give_up(f"it emulates x86-64 on x86-64, and this is {platform.system()} on {platform.machine()}")
    missing = [package for package, path in PACKAGES.items() if not os.path.exists(path)]
    stamp = CACHE / "stamp"
    has_kernel = stamp.exists() and stamp.read_text() == VERSION
    if not may_install and (missing or not has_kernel):
        give_up("it is not installed; `tools/rdma_vm.py --prepare`, as root on Debian, does that")
    if missing:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            give_up(f"packages are missing, and installing them takes Debian and root: {' '.join(missing)}")
        note("installing " + " ".join(missing))
        environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
        need(["apt-get", "update", "-q"], environment)
        need(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], environment)
    if not has_kernel:
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            unpack_kernel(Path(folder))
        stamp.write_text(VERSION)


def unpack_kernel(work: Path) -> None:
    """vmlinux, initramfs and modules go into the cache."""
    depends = need(["apt-cache", "depends", "linux-image-amd64"])
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        give_up("apt knows no linux-image-amd64")
    note("downloading " + found.group(1))
    need(["apt-get", "download", "-q", found.group(1)], cwd=work)
    need(["dpkg", "-x", glob.glob(f"{work}/*.deb")[0], f"{work}/x"])
    (version,) = os.listdir(work / "x/lib/modules")
    for junk in JUNK:
        shutil.rmtree(work / f"x/lib/modules/{version}/kernel/{junk}", ignore_errors=True)
    need(["/sbin/depmod", "-b", f"{work}/x", version])
    # booted uncompressed: the emulated processor would take seconds to unpack it each time
    packed = (work / f"x/boot/vmlinuz-{version}").read_bytes()
    (CACHE / "vmlinux").write_bytes(lzma.LZMADecompressor().decompress(packed[packed.index(b"\xfd7zXZ\0") :]))
    root = work / "initramfs"
    for name in ("bin", "sbin", "mod", "proc", "sys", "dev", "lower", "rw", "new", "ctl"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    rdma = shutil.which("rdma", path="/bin:/sbin:/usr/bin:/usr/sbin")
    for tool in ("/sbin/ip", str(rdma)):
        shutil.copy(tool, root / "sbin")
        for library in re.findall(r"(/\S+) \(0x", need(["ldd", tool])):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library[1:])
    loaded: list[str] = []
    for stage, modules in (("boot", BOOT_MODULES), ("rdma", RDMA_MODULES)):
        order: list[str] = []
        for module in modules:
            shown = need(["/sbin/modprobe", "-d", f"{work}/x", "-S", version, "--show-depends", module])
            order += [path for path in re.findall(r"^insmod (\S+)", shown, re.MULTILINE) if path not in loaded + order]
        for path in order:
            shutil.copy(path, root / "mod")
        (root / "mod" / stage).write_text(" ".join(os.path.basename(path) for path in order) + "\n")
        loaded += order
    names = subprocess.run(["find", ".", "-print0"], cwd=root, stdout=subprocess.PIPE, check=True).stdout
    with (CACHE / "initramfs").open("wb") as file:
        subprocess.run(["/bin/busybox", "cpio", "-o", "-H", "newc", "-0"], cwd=root, input=names, stdout=file,
                       stderr=subprocess.DEVNULL, check=True)  # fmt: skip
    shutil.rmtree(CACHE / "lib", ignore_errors=True)
    (work / "x/lib").rename(CACHE / "lib")


def need(command: list[str], environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, errors="replace")  # fmt: skip
    if done.returncode:
        give_up(f"`{shlex.join(command)}` failed: {done.stdout[-500:].strip()}")
    return done.stdout


# -- the machine ------------------------------------------------------------------------------------------------------


def write_control(control: Path, command: list[str]) -> None:
    """What the guest is told, in a folder that it mounts."""
    (control / "vars").write_text(f"KERNEL={shlex.quote(str(CACHE))}\nHERE={shlex.quote(os.getcwd())}\n")
    (control / "stage2").write_text(STAGE2)
    exports = [
        f"export {name}={shlex.quote(value)}\n"
        for name, value in os.environ.items()
        if re.fullmatch(r"[A-Za-z_]\w*", name) and name not in ("_", "SHLVL", "PWD", "OLDPWD")
    ]
    script = control / "command"
    script.touch(0o600)  # the environment may hold secrets
    script.write_text("".join(exports) + f"cd {shlex.quote(os.getcwd())} || exit 125\nexec {shlex.join(command)}\n")


class Machine:
    """One guest, booted again if it does not come up."""

    running: subprocess.Popen[bytes] | None = None

    def __init__(self, control: Path, memory_mib: int, *, counts_instructions: bool) -> None:
        self.boot_s = 0.0
        self._within_s = COUNTED_BOOT_S if counts_instructions else BOOT_S
        self._control = control
        self._console: list[bytes] = []
        self._has_begun = threading.Event()  # its command, or its end
        self._command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-machine", "q35", "-smp", "1", "-m", f"{memory_mib}M",
            "-accel", f"tcg,thread={'single' if counts_instructions else 'multi'},tb-size=256",
            *(("-icount", "shift=0") if counts_instructions else ()),
            "-cpu", "max,la57=off,-monitor",  # without mwait an idle guest sleeps
            "-kernel", f"{CACHE}/vmlinux", "-initrd", f"{CACHE}/initramfs",
            "-append", "console=ttyS0 panic=-1 oops=panic nokaslr mitigations=off quiet loglevel=6 no_timer_check "
            "tsc=reliable random.trust_cpu=on audit=0 selinux=0 apparmor=0 nowatchdog rcupdate.rcu_expedited=1 "
            "rdinit=/init",
            "-chardev", "file,id=con,path=/dev/fdset/3,append=on", "-serial", "chardev:con",
            "-device", "virtio-serial-pci",
            "-chardev", "file,id=out,path=/dev/fdset/1,append=on", "-device", "virtserialport,chardev=out,name=out",
            "-chardev", "file,id=err,path=/dev/fdset/2,append=on", "-device", "virtserialport,chardev=err,name=err",
        ]  # fmt: skip
        security = "passthrough" if os.geteuid() == 0 else "none"
        for tag, path, more in (("ctl", control, ""), ("root", "/", ",readonly=on"), ("here", os.getcwd(), "")):
            where = str(path).replace(",", ",,")
            self._command += [
                "-fsdev", f"local,id={tag},path={where},security_model={security},multidevs=remap{more}",
                "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
            ]  # fmt: skip

    def run(self, deadline: float) -> int:
        for _ in range(BOOT_TRIES):
            began = time.monotonic()
            has_booted = self._boot(min(began + self._within_s, deadline), deadline)
            if has_booted or time.monotonic() >= deadline:
                break
        status = self._control / "status"
        if status.exists():
            return int(status.read_text())
        is_late = time.monotonic() >= deadline
        console = b"".join(self._console).decode(errors="replace")[-3000:]
        note(("it took too long" if is_late else "the guest ended without a status") + "; its console:\n" + console)
        return TIMED_OUT if is_late else FAILED

    def _boot(self, boot_deadline: float, deadline: float) -> bool:
        """Whether its command began."""
        began = time.monotonic()
        self._console.clear()
        self._has_begun.clear()
        pipes = {number: os.pipe() for number in (1, 2, 3)}  # the command's output and errors, and the console
        more = [word for number, (_, end) in pipes.items() for word in ("-add-fd", f"fd={end},set={number}")]
        qemu = subprocess.Popen([*self._command, *more], stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
                                pass_fds=[end for _, end in pipes.values()])  # fmt: skip
        Machine.running = qemu
        for _, end in pipes.values():
            os.close(end)
        threads = [
            threading.Thread(target=self._pump, args=(number if number < 3 else 0, source))
            for number, (source, _) in pipes.items()
        ]
        for thread in threads:
            thread.start()
        self._has_begun.wait(max(0.0, boot_deadline - time.monotonic()))
        self.boot_s = time.monotonic() - began
        has_begun = self._has_begun.is_set() and b"rdma-vm: run" in b"".join(self._console)
        try:
            qemu.wait(max(0.0, deadline - time.monotonic()) if has_begun else 0.0)
        except subprocess.TimeoutExpired:
            qemu.kill()
            qemu.wait()
        for thread in threads:
            thread.join()
        return has_begun

    def _pump(self, to: int, source: int) -> None:
        with open(source, "rb", buffering=0) as file:
            while some := file.read(65536):
                if to:
                    os.write(to, some)
                else:
                    self._console.append(some)
                    if b"rdma-vm: run" in b"".join(self._console):
                        self._has_begun.set()
        if not to:
            self._has_begun.set()


def end(number: int, frame: FrameType | None) -> NoReturn:
    if Machine.running is not None:
        Machine.running.kill()
    sys.exit(128 + number)


def note(sentence: str) -> None:
    print(f"rdma_vm: {sentence}", file=sys.stderr, flush=True)


def give_up(why: str) -> NoReturn:
    note(f"cannot run here: {why}")
    sys.exit(CANNOT)


if __name__ == "__main__":
    sys.exit(main())
