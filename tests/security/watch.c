/* The hostile process of these tests: it lives in a container and looks at every process it can see, as fast as it can.
 *
 *   watch SECONDS OWN HOST
 *
 * OWN is a path that exists in the container, HOST one that exists on the host only. One line for each new finding:
 *   exe TARGET        what /proc/PID/exe says                      (CVE-2019-5736)
 *   wrote TARGET      that file could be opened for writing        (CVE-2019-5736)
 *   own, host         OWN or HOST seen through another process's root, working directory or descriptor
 *   python            a command line with an interpreter in it
 *   uids R E S F      user ids of a process, as this user namespace has them; 65534 for one it has no number for
 *   ready             the first round is done
 * It ends after SECONDS, or when /stop exists. A file it can write to gets its first byte written once more.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MOST 64

static char seen[MOST][PATH_MAX + 16];
static int exe[MOST];
static char exe_name[MOST][PATH_MAX];
static int exes;

static void say(const char *what, const char *of)
{
	char line[PATH_MAX + 16];
	int i;

	snprintf(line, sizeof line, "%s %s", what, of);
	for (i = 0; i < MOST && seen[i][0]; i++)
		if (!strcmp(seen[i], line))
			return;
	if (i < MOST)
		strcpy(seen[i], line);
	puts(line);
	fflush(stdout);
}

static void through(const char *door, const char *own, const char *host)
{
	char path[PATH_MAX];
	struct stat status;

	snprintf(path, sizeof path, "%s/%s", door, own);
	if (!stat(path, &status))
		say("own", "");
	snprintf(path, sizeof path, "%s/%s", door, host);
	if (!stat(path, &status))
		say("host", door + strcspn(door + 6, "/") + 6);
}

static void look_at(const char *pid, const char *own, const char *host)
{
	char path[PATH_MAX], text[PATH_MAX];
	ssize_t length;
	struct dirent *entry;
	DIR *fds;
	int fd, i;

	snprintf(path, sizeof path, "/proc/%s/exe", pid);
	length = readlink(path, text, sizeof text - 1);
	if (length > 0) {
		text[length] = 0;
		say("exe", text);
		for (i = 0; i < exes && strcmp(exe_name[i], text); i++)
			;
		if (i == exes && exes < MOST && (fd = open(path, O_RDONLY | O_CLOEXEC)) >= 0) {
			exe[exes] = fd;
			strcpy(exe_name[exes++], text);
		}
	}
	snprintf(path, sizeof path, "/proc/%s/status", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		char *line;
		length = read(fd, text, sizeof text - 1);
		close(fd);
		text[length > 0 ? length : 0] = 0;
		if ((line = strstr(text, "\nUid:"))) {
			*strchr(line + 1, '\n') = 0;
			say("uids", line + 6);
		}
	}
	snprintf(path, sizeof path, "/proc/%s/root", pid);
	through(path, own, host);
	snprintf(path, sizeof path, "/proc/%s/cwd", pid);
	through(path, own, host);
	snprintf(path, sizeof path, "/proc/%s/cmdline", pid);
	fd = open(path, O_RDONLY);
	if (fd >= 0) {
		length = read(fd, text, sizeof text - 1);
		close(fd);
		if (length > 0 && memmem(text, length, "python", 6))
			say("python", "");
	}
	snprintf(path, sizeof path, "/proc/%s/fd", pid);
	fds = opendir(path);
	if (!fds)
		return;
	while ((entry = readdir(fds)))
		if (entry->d_name[0] != '.') {
			snprintf(path, sizeof path, "/proc/%s/fd/%s", pid, entry->d_name);
			through(path, own, host);
		}
	closedir(fds);
}

int main(int count, char **words)
{
	struct timespec now, end;
	struct stat status;
	char path[64];
	int i, fd;

	if (count != 4)
		return 2;
	clock_gettime(CLOCK_MONOTONIC, &end);
	end.tv_sec += atoi(words[1]);
	do {
		struct dirent *entry;
		DIR *processes = opendir("/proc");
		if (!processes)
			return 3;
		while ((entry = readdir(processes)))
			if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9' && atoi(entry->d_name) != getpid())
				look_at(entry->d_name, words[2], words[3]);
		closedir(processes);
		for (i = 0; i < exes; i++) {
			snprintf(path, sizeof path, "/proc/self/fd/%d", exe[i]);
			fd = open(path, O_WRONLY | O_CLOEXEC);
			if (fd >= 0) {
				/* a sealed file opens, but a write of no bytes is not enough to tell: change one byte to itself */
				char byte;
				if (pread(exe[i], &byte, 1, 0) == 1 && pwrite(fd, &byte, 1, 0) == 1)
					say("wrote", exe_name[i]);
				close(fd);
			}
		}
		say("ready", "");
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while (now.tv_sec < end.tv_sec && stat("/stop", &status));
	return 0;
}
