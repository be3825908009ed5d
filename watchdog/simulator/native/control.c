/* The writing side, which Python loads (../control.py). Kept out of the driver library: who injects faults must not
 * have a library named libnvidia-ml.so.1 in its process. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "state.h"

#define EXPORT __attribute__((visibility("default")))

/* What Python checks its own description against. */
EXPORT const uint32_t sim_layout[] = {
    SIM_LAYOUT,
    SIM_MAX_GPUS,
    SIM_NVLINKS,
    SIM_NVLINK_COUNTERS,
    sizeof(struct sim_state),
    sizeof(struct sim_gpu),
    offsetof(struct sim_gpu, flap_start_ns),
    offsetof(struct sim_gpu, temperature_c),
    offsetof(struct sim_gpu, nvlink_errors),
    offsetof(struct sim_gpu, fabric_cluster),
};

/* NULL with errno set on failure. */
EXPORT struct sim_map *sim_open(const char *path)
{
    struct sim_map *map = calloc(1, sizeof *map);
    if (!map)
        return NULL;
    int error = sim_attach(map, path, true);
    if (error) {
        free(map);
        errno = error;
        return NULL;
    }
    return map;
}

EXPORT void sim_close(struct sim_map *map)
{
    sim_detach(map);
    free(map);
}

/* 0, ETIMEDOUT when others held the lock for all of that time, or another errno. */
EXPORT int sim_lock(struct sim_map *map, uint32_t timeout_ms)
{
    const struct timespec pause = {0, 500000};
    uint64_t deadline = sim_now_ns() + (uint64_t)timeout_ms * 1000000;
    while (flock(map->fd, LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK && errno != EINTR)
            return errno;
        if (sim_now_ns() >= deadline)
            return ETIMEDOUT;
        nanosleep(&pause, NULL);
    }
    return 0;
}

EXPORT void sim_unlock(struct sim_map *map)
{
    flock(map->fd, LOCK_UN);
}

EXPORT uint32_t sim_count(const struct sim_map *map)
{
    return __atomic_load_n(&map->state->gpus, __ATOMIC_ACQUIRE);
}

EXPORT void sim_get(const struct sim_map *map, uint32_t gpu, struct sim_gpu *copy)
{
    sim_read(map, gpu, copy);
}

/* The functions below need the lock. */

EXPORT void sim_set_count(struct sim_map *map, uint32_t gpus)
{
    __atomic_store_n(&map->state->gpus, gpus, __ATOMIC_RELEASE);
}

EXPORT void sim_get_locked(const struct sim_map *map, uint32_t gpu, struct sim_gpu *copy)
{
    memcpy(copy, &map->state->slots[gpu].gpu, sizeof *copy);
}

EXPORT void sim_put(struct sim_map *map, uint32_t gpu, const struct sim_gpu *record)
{
    struct sim_slot *slot = &map->state->slots[gpu];
    /* Odd already, if a writer died half-way. */
    uint32_t writing = __atomic_load_n(&slot->sequence, __ATOMIC_RELAXED) | 1;
    __atomic_store_n(&slot->sequence, writing, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    memcpy(&slot->gpu, record, sizeof *record);
    __atomic_store_n(&slot->sequence, writing + 1, __ATOMIC_RELEASE);
}

EXPORT void sim_post(struct sim_map *map, uint32_t gpu, uint64_t type, uint64_t data)
{
    struct sim_state *state = map->state;
    uint64_t number = __atomic_load_n(&state->events, __ATOMIC_RELAXED) + 1;
    struct sim_event *event = &state->ring[number % SIM_EVENT_SLOTS];
    __atomic_store_n(&event->number, 0, __ATOMIC_RELAXED);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    event->gpu = gpu;
    event->generation = state->slots[gpu].gpu.generation;
    event->type = type;
    event->data = data;
    __atomic_store_n(&event->number, number, __ATOMIC_RELEASE);
    __atomic_store_n(&state->events, number, __ATOMIC_RELEASE);
}

/* Ends a change: wakes who waits for an event, or for a GPU to be healed. */
EXPORT void sim_wake(struct sim_map *map)
{
    __atomic_add_fetch(&map->state->changes, 1, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &map->state->changes, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}
