/* Starting and ending NVML, the table of handles, and how a call with a handle begins. */
#include "driver.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define STATE_VARIABLE "ELASTIC_NVML_SIMULATOR"
#define DRIVER_VERSION "580.0-simulated"
#define NVML_VERSION "13.580.0-simulated"
#define CUDA_VERSION 13000

static pthread_mutex_t start_lock = PTHREAD_MUTEX_INITIALIZER;
static unsigned int users;
static struct sim_map *mapped;  /* the latest, kept for the next start */
static struct sim_map *current; /* NULL unless started */
static struct nvmlDevice_st devices[SIM_MAX_GPUS];
static uint32_t device_count;

struct sim_map *driver_map(void)
{
    return __atomic_load_n(&current, __ATOMIC_ACQUIRE);
}

nvmlDevice_t driver_device(uint32_t slot)
{
    return &devices[slot];
}

static bool is_mapped(const char *path)
{
    struct stat now, then;
    return mapped && stat(path, &now) == 0 && fstat(mapped->fd, &then) == 0 && now.st_dev == then.st_dev &&
           now.st_ino == then.st_ino;
}

static nvmlReturn_t map_state(void)
{
    const char *path = getenv(STATE_VARIABLE);
    if (!path || !*path)
        return NVML_ERROR_DRIVER_NOT_LOADED;
    if (is_mapped(path))
        return NVML_SUCCESS;
    struct sim_map *map = calloc(1, sizeof *map);
    if (!map)
        return NVML_ERROR_MEMORY;
    int error = sim_attach(map, path, false);
    if (!error) {
        mapped = map;
        return NVML_SUCCESS;
    }
    free(map);
    switch (error) {
    case EACCES:
    case EPERM:
        return NVML_ERROR_NO_PERMISSION;
    case EPROTO:
        return NVML_ERROR_LIB_RM_VERSION_MISMATCH;
    default:
        return NVML_ERROR_DRIVER_NOT_LOADED;
    }
}

static void enumerate(void)
{
    uint32_t gpus = __atomic_load_n(&mapped->state->gpus, __ATOMIC_ACQUIRE);
    device_count = 0;
    for (uint32_t slot = 0; slot < SIM_MAX_GPUS; slot++) {
        struct nvmlDevice_st *device = &devices[slot];
        struct sim_gpu gpu;
        sim_read(mapped, slot, &gpu);
        device->slot = slot;
        device->generation = gpu.generation;
        device->present = slot < gpus && !sim_lost(&gpu, sim_now_ns());
        device->index = device->present ? device_count++ : 0;
    }
}

NVML_EXPORT nvmlReturn_t nvmlInitWithFlags(unsigned int flags)
{
    nvmlReturn_t result = NVML_SUCCESS;
    pthread_mutex_lock(&start_lock);
    if (users == 0) {
        result = map_state();
        if (result == NVML_SUCCESS) {
            enumerate();
            __atomic_store_n(&current, mapped, __ATOMIC_RELEASE);
        }
    }
    if (result == NVML_SUCCESS)
        users++;
    pthread_mutex_unlock(&start_lock);
    (void)flags; /* NVML_INIT_FLAG_NO_GPUS makes no difference: there is a GPU here */
    return result;
}

NVML_EXPORT nvmlReturn_t nvmlInit_v2(void)
{
    return nvmlInitWithFlags(0);
}

NVML_EXPORT nvmlReturn_t nvmlShutdown(void)
{
    nvmlReturn_t result = NVML_SUCCESS;
    pthread_mutex_lock(&start_lock);
    if (users == 0)
        result = NVML_ERROR_UNINITIALIZED;
    else if (--users == 0)
        __atomic_store_n(&current, (struct sim_map *)NULL, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&start_lock);
    return result;
}

NVML_EXPORT const char *nvmlErrorString(nvmlReturn_t result)
{
    switch (result) {
    case NVML_SUCCESS:
        return "Success";
    case NVML_ERROR_UNINITIALIZED:
        return "Uninitialized";
    case NVML_ERROR_INVALID_ARGUMENT:
        return "Invalid Argument";
    case NVML_ERROR_NOT_SUPPORTED:
        return "Not Supported";
    case NVML_ERROR_NO_PERMISSION:
        return "Insufficient Permissions";
    case NVML_ERROR_NOT_FOUND:
        return "Not Found";
    case NVML_ERROR_INSUFFICIENT_SIZE:
        return "Insufficient Size";
    case NVML_ERROR_DRIVER_NOT_LOADED:
        return "Driver Not Loaded";
    case NVML_ERROR_TIMEOUT:
        return "Timeout";
    case NVML_ERROR_GPU_IS_LOST:
        return "GPU is lost";
    case NVML_ERROR_RESET_REQUIRED:
        return "GPU requires reset";
    case NVML_ERROR_LIB_RM_VERSION_MISMATCH:
        return "Driver/library version mismatch";
    case NVML_ERROR_MEMORY:
        return "Insufficient Memory";
    case NVML_ERROR_ARGUMENT_VERSION_MISMATCH:
        return "Argument version mismatch";
    case NVML_ERROR_UNKNOWN:
        break;
    }
    return "Unknown Error";
}

nvmlReturn_t driver_give_text(const char *text, char *buffer, unsigned int length)
{
    if (!driver_map())
        return NVML_ERROR_UNINITIALIZED;
    if (!buffer)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (strlen(text) >= length)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    return driver_give_text(DRIVER_VERSION, version, length);
}

NVML_EXPORT nvmlReturn_t nvmlSystemGetNVMLVersion(char *version, unsigned int length)
{
    return driver_give_text(NVML_VERSION, version, length);
}

NVML_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    if (!driver_map())
        return NVML_ERROR_UNINITIALIZED;
    if (!version)
        return NVML_ERROR_INVALID_ARGUMENT;
    *version = CUDA_VERSION;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlSystemGetCudaDriverVersion(int *version)
{
    return nvmlSystemGetCudaDriverVersion_v2(version);
}

static bool is_handle(nvmlDevice_t device)
{
    uintptr_t offset = (uintptr_t)device - (uintptr_t)devices;
    return offset < sizeof devices && offset % sizeof devices[0] == 0;
}

/* The slow and the hanging call: back when the GPU's faults let the call go on. */
static void sit_out(const struct sim_map *map, uint32_t slot, struct sim_gpu *gpu)
{
    uint64_t start = sim_now_ns();
    for (;;) {
        uint32_t seen = sim_changes(map);
        sim_read(map, slot, gpu);
        uint64_t ready = start + (uint64_t)gpu->latency_ms * 1000000;
        if (!gpu->hang && sim_now_ns() >= ready)
            return;
        sim_wait(map, seen, gpu->hang ? UINT64_MAX : ready);
    }
}

nvmlReturn_t driver_enter(nvmlDevice_t device, uint32_t needs, struct sim_gpu *gpu)
{
    const struct sim_map *map = driver_map();
    if (!map)
        return NVML_ERROR_UNINITIALIZED;
    if (!is_handle(device))
        return NVML_ERROR_INVALID_ARGUMENT;
    sit_out(map, device->slot, gpu);
    if (!device->present || device->generation != gpu->generation || sim_lost(gpu, sim_now_ns()))
        return NVML_ERROR_GPU_IS_LOST;
    if (gpu->reset_required && !(needs & DRIVER_AFTER_RESET_REQUIRED))
        return NVML_ERROR_RESET_REQUIRED;
    if (gpu->error && !(needs & DRIVER_AFTER_RESET_REQUIRED))
        return (nvmlReturn_t)gpu->error;
    if (gpu->unsupported & needs & ~(uint32_t)DRIVER_AFTER_RESET_REQUIRED)
        return NVML_ERROR_NOT_SUPPORTED;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetCount_v2(unsigned int *count)
{
    if (!driver_map())
        return NVML_ERROR_UNINITIALIZED;
    if (!count)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = device_count;
    return NVML_SUCCESS;
}

static nvmlReturn_t give_handle(nvmlDevice_t found, nvmlDevice_t *device)
{
    struct sim_gpu gpu;
    nvmlReturn_t result = driver_enter(found, DRIVER_AFTER_RESET_REQUIRED, &gpu);
    if (result == NVML_SUCCESS)
        *device = found;
    return result;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device)
{
    if (!driver_map())
        return NVML_ERROR_UNINITIALIZED;
    if (!device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t slot = 0; slot < SIM_MAX_GPUS; slot++)
        if (devices[slot].present && devices[slot].index == index)
            return give_handle(&devices[slot], device);
    return NVML_ERROR_INVALID_ARGUMENT;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device)
{
    const struct sim_map *map = driver_map();
    if (!map)
        return NVML_ERROR_UNINITIALIZED;
    if (!uuid || !device)
        return NVML_ERROR_INVALID_ARGUMENT;
    for (uint32_t slot = 0; slot < SIM_MAX_GPUS; slot++) {
        struct sim_gpu gpu;
        if (!devices[slot].present)
            continue;
        sim_read(map, slot, &gpu);
        if (gpu.generation == devices[slot].generation && strcmp(gpu.uuid, uuid) == 0)
            return give_handle(&devices[slot], device);
    }
    return NVML_ERROR_NOT_FOUND;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, nvmlDevice_t *device)
{
    unsigned int domain, bus, number, function;
    if (!driver_map())
        return NVML_ERROR_UNINITIALIZED;
    if (!bus_id || !device || sscanf(bus_id, "%x:%x:%x.%x", &domain, &bus, &number, &function) != 4)
        return NVML_ERROR_INVALID_ARGUMENT;
    uint32_t slot = bus - 1; /* as in nvmlDeviceGetPciInfo_v3 */
    if (domain || number || function || slot >= SIM_MAX_GPUS || !devices[slot].present)
        return NVML_ERROR_NOT_FOUND;
    return give_handle(&devices[slot], device);
}
