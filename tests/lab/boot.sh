# The lab host's first user-space program after the switch to its root: mounts, then the agent as PID 1.
# Arguments: the directory of the kernel's modules, the Python interpreter, the agent, the directory to work in.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LAB=1
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -p /dev/pts /dev/shm /dev/mqueue /run/lock /run/netns /root /lib/modules
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t mqueue mqueue /dev/mqueue
ln -sf /proc/self/fd /dev/fd && ln -sf fd/0 /dev/stdin && ln -sf fd/1 /dev/stdout && ln -sf fd/2 /dev/stderr
ln -sf pts/ptmx /dev/ptmx
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t securityfs securityfs /sys/kernel/security
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
mkdir -p "/lib/modules/$(uname -r)"
mount --bind "$1" "/lib/modules/$(uname -r)"
modprobe -a acpi-cpufreq virtio_net # nobody else would: udev loads them elsewhere
busybox ifconfig lo up
cd "$4" && exec "$2" -ISs "$3"
