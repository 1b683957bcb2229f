# The lab host's first user-space program after the switch to its root: mounts, then the agent as PID 1.
# Arguments: the kernel's directory in the cache, the Python interpreter, the agent, the directory to work in.
set -e # whatever goes wrong here ends the boot, with its words on the console
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LAB=1

# What is needed of the machine's own file system must stay in view where a tmpfs will lie over it.
hidden() { case "$1" in /tmp/* | /run/* | /var/lib/*) ;; *) false ;; esac; }
for directory in "$1" "$4"; do
    if hidden "$directory"; then
        mkdir -p "/mnt/lab$directory" && mount --bind "$directory" "/mnt/lab$directory"
    fi
done
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
for directory in "$1" "$4"; do
    if hidden "$directory"; then
        mkdir -p "$directory" && mount --move "/mnt/lab$directory" "$directory"
    fi
done

mkdir -p /dev/pts /dev/shm /dev/mqueue /run/lock /run/netns /root
ls /root >/dev/null 2>&1 || mount -t tmpfs -o mode=700 tmpfs /root # whoever emulates may be a normal user
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
ln -sf /proc/self/fd /dev/fd && ln -sf fd/0 /dev/stdin && ln -sf fd/1 /dev/stdout && ln -sf fd/2 /dev/stderr
ln -sf pts/ptmx /dev/ptmx
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
modules="lib/modules/$(uname -r)"
mkdir -p "/$modules"
mount --bind "$1/$modules" "/$modules"
modprobe virtio_net # nobody else would: udev loads it elsewhere
modprobe acpi-cpufreq || echo "lab: without P-states" # a processor that KVM passes through may have its own
busybox ifconfig lo up
cd "$4" && exec "$2" -ISs "$3"
