#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S UINT64_C(1000000000)
#define WRITER_PATIENCE_NS (NS_PER_S / 20)

uint64_t sim_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

int sim_attach(struct sim_map *map, const char *path, bool writable)
{
    struct stat status;
    int fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = 0;
    if (fstat(fd, &status) != 0)
        error = errno;
    else if (status.st_size < (off_t)offsetof(struct sim_state, gpus))
        error = EINVAL;
    if (!error) {
        uint64_t magic = 0;
        uint32_t head[2] = {0, 0};
        if (pread(fd, &magic, sizeof magic, 0) != (ssize_t)sizeof magic || magic != SIM_MAGIC)
            error = EINVAL;
        else if (pread(fd, head, sizeof head, sizeof magic) != (ssize_t)sizeof head || head[0] != SIM_LAYOUT ||
                 head[1] != sizeof(struct sim_state) || status.st_size != (off_t)sizeof(struct sim_state))
            error = EPROTO;
    }
    if (!error) {
        int protection = PROT_READ | (writable ? PROT_WRITE : 0);
        void *state = mmap(NULL, sizeof(struct sim_state), protection, MAP_SHARED, fd, 0);
        if (state == MAP_FAILED) {
            error = errno;
        } else {
            map->state = state;
            map->fd = fd;
            return 0;
        }
    }
    close(fd);
    return error;
}

void sim_detach(struct sim_map *map)
{
    if (!map->state)
        return;
    munmap(map->state, sizeof(struct sim_state));
    close(map->fd);
    map->state = NULL;
    map->fd = -1;
}

static bool try_read(const struct sim_slot *slot, struct sim_gpu *copy)
{
    uint32_t before = __atomic_load_n(&slot->sequence, __ATOMIC_ACQUIRE);
    if (before & 1)
        return false;
    memcpy(copy, &slot->gpu, sizeof *copy);
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&slot->sequence, __ATOMIC_RELAXED) == before;
}

void sim_read(const struct sim_map *map, uint32_t gpu, struct sim_gpu *copy)
{
    const struct sim_slot *slot = &map->state->slots[gpu];
    uint64_t patience = 0;
    while (!try_read(slot, copy)) {
        uint64_t now = sim_now_ns();
        if (!patience) {
            patience = now + WRITER_PATIENCE_NS;
        } else if (now > patience && flock(map->fd, LOCK_SH | LOCK_NB) == 0) {
            memcpy(copy, &slot->gpu, sizeof *copy);
            flock(map->fd, LOCK_UN);
            return;
        }
        sched_yield();
    }
}

bool sim_lost(const struct sim_gpu *gpu, uint64_t now_ns)
{
    if (gpu->lost || gpu->flap_period_ns < 2)
        return gpu->lost;
    return now_ns < gpu->flap_start_ns || (now_ns - gpu->flap_start_ns) / (gpu->flap_period_ns / 2) % 2 == 0;
}

uint32_t sim_changes(const struct sim_map *map)
{
    return __atomic_load_n(&map->state->changes, __ATOMIC_ACQUIRE);
}

void sim_wait(const struct sim_map *map, uint32_t seen, uint64_t deadline_ns)
{
    struct timespec left, *timeout = NULL;
    if (deadline_ns != UINT64_MAX) {
        uint64_t now = sim_now_ns();
        if (now >= deadline_ns)
            return;
        left.tv_sec = (time_t)((deadline_ns - now) / NS_PER_S);
        left.tv_nsec = (long)((deadline_ns - now) % NS_PER_S);
        timeout = &left;
    }
    /* Not the private kind: the writer is another process. Whatever ends the wait, the caller looks again. */
    long result = syscall(SYS_futex, &map->state->changes, FUTEX_WAIT, seen, timeout, NULL, 0);
    if (result != 0 && errno != EAGAIN && errno != EINTR && errno != ETIMEDOUT) {
        const struct timespec pause = {0, 2000000};
        nanosleep(&pause, NULL); /* a kernel without futexes on files: poll */
    }
}
