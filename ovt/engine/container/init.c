/* ovt-init: the first instruction of every container process.
 *
 * What it is: an interpreter of tapes. A tape is a list of raw system calls with prepared arguments that the runtime
 * (tape.py) writes down and sends over a socket; this program executes them in order, reports the first failure and
 * ends, or asks for the next tape. The last call of the last tape is the execve of the container's own program.
 * What it is not: it takes no decision, parses no configuration, allocates nothing but the tape, needs no libc. So
 * no interpreter, library or file of the host is ever mapped into a process that the container can see, and a
 * container that waits for `start` costs a few pages.
 *
 * It is executed as `ovt-init FD`, FD being the socket. Wire format, all little-endian and native width:
 *   header  u32 magic, ops, relocations, blob bytes;   up to 8 descriptors may ride along (SCM_RIGHTS)
 *   ops     struct op each
 *   relocs  u32 where, u32 target each: the 64-bit word at blob+where becomes the address blob+target
 *   blob    strings, arrays and structures that the calls point to
 * Reply: struct report. It follows every tape that ends without execve, every failure, and REPORT operations.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int i32;
typedef long i64;

#define MAGIC 0x3154564f /* "OVT1" */
#define MAX_TAPE (16u << 20)
#define MAX_FDS 8

enum { IMMEDIATE, POINTER, RESULT, DESCRIPTOR };
enum { IGNORE_ERROR = 1, PARENT_ENDS = 2, SKIP_IF_OK = 4 };
enum { REPORT = -1, CHECK_BYTE = -2, REPORT_TO = -3 };

struct op {
	i32 number;   /* system call, or one of the negative operations */
	u32 flags;
	u32 other;    /* SKIP_IF_OK: the operation whose success makes this one unnecessary */
	u8 kind[8];
	u32 pad;
	u64 arg[6];
	i64 result;
};

struct report {
	u32 index; /* of the operation; ~0 = tape done, ~1 = parent of a clone, ~2 = REPORT */
	i32 error; /* errno, 0 if none */
	i64 value;
};

#if defined(__x86_64__)
enum { SYS_read = 0, SYS_write = 1, SYS_mmap = 9, SYS_recvmsg = 47, SYS_sendto = 44, SYS_exit = 60, SYS_munmap = 11 };
static i64 call(i64 n, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
	register u64 r10 __asm__("r10") = d;
	register u64 r8 __asm__("r8") = e;
	register u64 r9 __asm__("r9") = f;
	i64 ret;
	__asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return ret;
}
__asm__(".globl _start\n_start:\n\txor %ebp,%ebp\n\tmov %rsp,%rdi\n\tand $-16,%rsp\n\tcall begin\n\thlt\n");
#elif defined(__aarch64__)
enum { SYS_read = 63, SYS_write = 64, SYS_mmap = 222, SYS_recvmsg = 212, SYS_sendto = 206, SYS_exit = 93, SYS_munmap = 215 };
static i64 call(i64 n, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
	register i64 x8 __asm__("x8") = n;
	register u64 x0 __asm__("x0") = a;
	register u64 x1 __asm__("x1") = b;
	register u64 x2 __asm__("x2") = c;
	register u64 x3 __asm__("x3") = d;
	register u64 x4 __asm__("x4") = e;
	register u64 x5 __asm__("x5") = f;
	__asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
	return (i64)x0;
}
__asm__(".globl _start\n_start:\n\tmov x29,xzr\n\tmov x0,sp\n\tbl begin\n");
#else
#error "ovt-init knows x86_64 and aarch64"
#endif

static u32 sync_fd;
static u32 report_is_file;

static void end(int status)
{
	for (;;)
		call(SYS_exit, status, 0, 0, 0, 0, 0);
}

static void report(u32 index, i32 error, i64 value)
{
	struct report r = { index, error, value };
	if (report_is_file)
		call(SYS_write, sync_fd, (u64)&r, sizeof r, 0, 0, 0);
	else /* MSG_NOSIGNAL: a runtime that was killed must not kill us by SIGPIPE with a core dump */
		call(SYS_sendto, sync_fd, (u64)&r, sizeof r, 0x4000, 0, 0);
}

/* The runtime is gone or lies: there is nobody to tell. */
static void read_all(u8 *to, u64 length)
{
	while (length) {
		i64 n = call(SYS_read, sync_fd, (u64)to, length, 0, 0, 0);
		if (n == -4)
			continue;
		if (n <= 0)
			end(125);
		to += n;
		length -= n;
	}
}

static i32 received[MAX_FDS];

static void read_header(u32 header[4])
{
	struct { u64 base, length; } iov = { (u64)header, 16 };
	struct { u64 length; u32 level, type; i32 fd[MAX_FDS]; } control = { 0, 0, 0, { 0 } };
	struct { u64 name; u32 name_length, pad; u64 iov, iov_count, control, control_length; u32 flags, pad2; } message = {
		0, 0, 0, (u64)&iov, 1, (u64)&control, sizeof control, 0, 0 };
	i64 n;

	do
		n = call(SYS_recvmsg, sync_fd, (u64)&message, 0x40000000 /* MSG_CMSG_CLOEXEC */, 0, 0, 0);
	while (n == -4);
	if (n <= 0)
		end(125);
	for (u32 i = 0; i < MAX_FDS; i++)
		received[i] = message.control_length >= 16 + 4 * (i + 1) && control.length >= 16 + 4 * (i + 1) ? control.fd[i] : -1;
	if (n < 16)
		read_all((u8 *)header + n, 16 - n);
}

static u64 value(struct op *ops, u8 *blob, u8 kind, u64 arg)
{
	switch (kind) {
	case POINTER:
		return (u64)(blob + arg);
	case RESULT:
		return ops[arg].result;
	case DESCRIPTOR:
		return received[arg];
	default:
		return arg;
	}
}

static void play(struct op *ops, u32 count, u8 *blob)
{
	for (u32 i = 0; i < count; i++) {
		struct op *op = &ops[i];
		u64 a[6];
		i64 r = 0;

		if (op->flags & SKIP_IF_OK && ops[op->other].result >= 0)
			continue;
		for (u32 k = 0; k < 6; k++)
			a[k] = value(ops, blob, op->kind[k], op->arg[k]);
		switch (op->number) {
		case REPORT:
			report(~2u, 0, a[0]);
			break;
		case CHECK_BYTE:
			if (*(u8 *)a[0] != a[1])
				r = -(i64)a[2];
			break;
		case REPORT_TO:
			sync_fd = a[0];
			report_is_file = 1;
			break;
		default:
			r = call(op->number, a[0], a[1], a[2], a[3], a[4], a[5]);
		}
		op->result = r;
		if (r < 0 && r > -4096 && !(op->flags & IGNORE_ERROR)) {
			report(i, -r, 0);
			end(126);
		}
		if (op->flags & PARENT_ENDS && r > 0) {
			report(~1u, 0, r);
			end(0);
		}
	}
	report(~0u, 0, count ? ops[count - 1].result : 0);
}

void begin(u64 *stack);
void begin(u64 *stack)
{
	const char *text = stack[0] > 1 ? (const char *)stack[2] : "";

	if (!*text)
		end(125);
	while (*text >= '0' && *text <= '9')
		sync_fd = sync_fd * 10 + (*text++ - '0');
	for (;;) {
		u32 header[4];
		u64 size;
		u8 *memory, *blob;
		u32 *relocation;

		read_header(header);
		if (header[0] != MAGIC || header[1] > 4096 || header[2] > MAX_TAPE / 8 || header[3] > MAX_TAPE)
			end(125);
		size = header[1] * sizeof(struct op) + header[2] * 8ul + header[3];
		memory = (u8 *)call(SYS_mmap, 0, size + 1, 3 /* read, write */, 0x22 /* private, anonymous */, -1, 0);
		if ((i64)memory < 0 && (i64)memory > -4096)
			end(125);
		read_all(memory, size);
		relocation = (u32 *)(memory + header[1] * sizeof(struct op));
		blob = (u8 *)(relocation + 2 * header[2]);
		for (u32 i = 0; i < header[2]; i++)
			*(u64 *)(blob + relocation[2 * i]) = (u64)(blob + relocation[2 * i + 1]);
		play((struct op *)memory, header[1], blob);
		call(SYS_munmap, (u64)memory, size + 1, 0, 0, 0, 0);
	}
}
