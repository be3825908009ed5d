/* Event sets: each has its own place in the ring of events, so that each gets every event it registered for once. */
#include <pthread.h>
#include <stdlib.h>

#include "driver.h"

#define SET_MAGIC 0x45564e54u
#define NO_INSTANCE 0xFFFFFFFFu /* the event is none of a MIG instance */

struct registration {
    uint64_t types;
    uint64_t since; /* number of the latest event at that time */
    uint32_t generation;
};

struct nvmlEventSet_st {
    uint32_t magic;
    struct sim_map *map;
    pthread_mutex_t lock;
    uint64_t seen; /* number of the latest event that was looked at */
    struct registration gpus[SIM_MAX_GPUS];
};

static uint64_t latest_event(const struct sim_map *map)
{
    return __atomic_load_n(&map->state->events, __ATOMIC_ACQUIRE);
}

static nvmlReturn_t check_set(nvmlEventSet_t set)
{
    struct sim_map *map = driver_map();
    if (!map)
        return NVML_ERROR_UNINITIALIZED;
    /* A set of another state file, one that has been replaced since, is of no use any more. */
    return set && set->magic == SET_MAGIC && set->map == map ? NVML_SUCCESS : NVML_ERROR_INVALID_ARGUMENT;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetSupportedEventTypes(nvmlDevice_t device, unsigned long long *types)
{
    struct sim_gpu gpu;
    if (!types)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = driver_enter(device, SIM_NO_EVENTS, &gpu);
    if (result != NVML_SUCCESS)
        return result;
    *types = nvmlEventTypeAllSupported & (gpu.unsupported & SIM_NO_NEW_EVENTS ? ~nvmlEventTypeNewer : ~0);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlEventSetCreate(nvmlEventSet_t *created)
{
    struct sim_map *map = driver_map();
    if (!map)
        return NVML_ERROR_UNINITIALIZED;
    if (!created)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlEventSet_t set = calloc(1, sizeof *set);
    if (!set)
        return NVML_ERROR_MEMORY;
    pthread_mutex_init(&set->lock, NULL);
    set->magic = SET_MAGIC;
    set->map = map;
    set->seen = latest_event(map);
    *created = set;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceRegisterEvents(nvmlDevice_t device, unsigned long long types, nvmlEventSet_t set)
{
    unsigned long long supported;
    nvmlReturn_t result = check_set(set);
    if (result == NVML_SUCCESS)
        result = nvmlDeviceGetSupportedEventTypes(device, &supported);
    if (result != NVML_SUCCESS)
        return result;
    if (types & ~supported)
        return NVML_ERROR_NOT_SUPPORTED;
    pthread_mutex_lock(&set->lock);
    struct registration *registration = &set->gpus[device->slot];
    if (!registration->types || registration->generation != device->generation) {
        registration->types = 0;
        registration->since = latest_event(set->map);
        registration->generation = device->generation;
    }
    registration->types |= types;
    pthread_mutex_unlock(&set->lock);
    return NVML_SUCCESS;
}

/* A consistent copy of event `number`, unless it has been overwritten. */
static bool read_event(const struct sim_map *map, uint64_t number, struct sim_event *copy)
{
    const struct sim_event *event = &map->state->ring[number % SIM_EVENT_SLOTS];
    if (__atomic_load_n(&event->number, __ATOMIC_ACQUIRE) != number)
        return false;
    *copy = *event;
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    return __atomic_load_n(&event->number, __ATOMIC_RELAXED) == number;
}

/* Takes the next event that the set registered for. */
static bool next_event(nvmlEventSet_t set, struct sim_event *event)
{
    uint64_t latest = latest_event(set->map);
    if (latest > set->seen + SIM_EVENT_SLOTS)
        set->seen = latest - SIM_EVENT_SLOTS; /* too late for the ones before */
    while (set->seen < latest) {
        set->seen++;
        if (!read_event(set->map, set->seen, event) || event->gpu >= SIM_MAX_GPUS)
            continue;
        const struct registration *registration = &set->gpus[event->gpu];
        if (registration->types & event->type && registration->generation == event->generation &&
            registration->since < event->number)
            return true;
    }
    return false;
}

NVML_EXPORT nvmlReturn_t nvmlEventSetWait_v2(nvmlEventSet_t set, nvmlEventData_t *data, unsigned int timeout_ms)
{
    nvmlReturn_t result = check_set(set);
    if (result != NVML_SUCCESS)
        return result;
    if (!data)
        return NVML_ERROR_INVALID_ARGUMENT;
    uint64_t deadline = sim_now_ns() + (uint64_t)timeout_ms * 1000000;
    for (;;) {
        uint32_t seen = sim_changes(set->map);
        struct sim_event event;
        pthread_mutex_lock(&set->lock);
        bool found = next_event(set, &event);
        pthread_mutex_unlock(&set->lock);
        if (found) {
            data->device = driver_device(event.gpu);
            data->eventType = event.type;
            data->eventData = event.data;
            data->gpuInstanceId = data->computeInstanceId = NO_INSTANCE;
            return NVML_SUCCESS;
        }
        if (sim_now_ns() >= deadline)
            return NVML_ERROR_TIMEOUT;
        sim_wait(set->map, seen, deadline);
    }
}

NVML_EXPORT nvmlReturn_t nvmlEventSetFree(nvmlEventSet_t set)
{
    nvmlReturn_t result = check_set(set);
    if (result != NVML_SUCCESS)
        return result;
    set->magic = 0;
    pthread_mutex_destroy(&set->lock);
    free(set);
    return NVML_SUCCESS;
}
