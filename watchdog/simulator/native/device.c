/* Calls about one GPU. */
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "driver.h"

#define PCI_DEVICE_ID 0x233010DE
#define POWER_LIMIT_MW 700000
#define PROCESS_MEMORY (512ull << 20)
#define NO_INSTANCE 0xffffffffu
#define IDENTITY DRIVER_AFTER_RESET_REQUIRED

/* Begins a call whose answer goes to `answer`; returns from it unless the GPU answers. */
#define ENTER(device, needs, answer)                                      \
    struct sim_gpu gpu;                                                   \
    if (!(answer))                                                        \
        return NVML_ERROR_INVALID_ARGUMENT;                               \
    nvmlReturn_t entered = driver_enter((device), (uint32_t)(needs), &gpu); \
    if (entered != NVML_SUCCESS)                                          \
        return entered

NVML_EXPORT nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length)
{
    ENTER(device, IDENTITY, uuid);
    return driver_give_text(gpu.uuid, uuid, length);
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length)
{
    ENTER(device, IDENTITY, name);
    return driver_give_text(gpu.name, name, length);
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetIndex(nvmlDevice_t device, unsigned int *index)
{
    ENTER(device, IDENTITY, index);
    *index = device->index;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetMinorNumber(nvmlDevice_t device, unsigned int *minor)
{
    ENTER(device, IDENTITY, minor);
    *minor = device->slot;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetPciInfo_v3(nvmlDevice_t device, nvmlPciInfo_t *pci)
{
    ENTER(device, IDENTITY, pci);
    memset(pci, 0, sizeof *pci);
    pci->bus = (device->slot + 1) & 0xff;
    pci->pciDeviceId = PCI_DEVICE_ID;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", pci->bus & 0xffu);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus & 0xffu);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetArchitecture(nvmlDevice_t device, unsigned int *architecture)
{
    ENTER(device, IDENTITY, architecture);
    *architecture = NVML_DEVICE_ARCH_HOPPER;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetCudaComputeCapability(nvmlDevice_t device, int *major, int *minor)
{
    ENTER(device, IDENTITY, major && minor);
    *major = 9;
    *minor = 0;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetPersistenceMode(nvmlDevice_t device, unsigned int *mode)
{
    ENTER(device, 0, mode);
    *mode = NVML_FEATURE_ENABLED;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *now, unsigned int *pending)
{
    ENTER(device, 0, now && pending);
    *now = *pending = NVML_FEATURE_DISABLED;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory)
{
    ENTER(device, 0, memory);
    memory->total = gpu.memory_total;
    memory->used = gpu.memory_used;
    memory->free = gpu.memory_total - gpu.memory_used;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory)
{
    ENTER(device, 0, memory);
    if (memory->version != NVML_STRUCT_VERSION(sizeof *memory, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memory->total = gpu.memory_total;
    memory->reserved = 0;
    memory->used = gpu.memory_used;
    memory->free = gpu.memory_total - gpu.memory_used;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *rates)
{
    ENTER(device, 0, rates);
    rates->gpu = rates->memory = gpu.utilization_percent;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *milliwatts)
{
    ENTER(device, 0, milliwatts);
    *milliwatts = gpu.power_mw;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetEnforcedPowerLimit(nvmlDevice_t device, unsigned int *milliwatts)
{
    ENTER(device, 0, milliwatts);
    *milliwatts = POWER_LIMIT_MW;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, unsigned int sensor, unsigned int *celsius)
{
    ENTER(device, SIM_NO_TEMPERATURE, celsius);
    if (sensor != NVML_TEMPERATURE_GPU)
        return NVML_ERROR_INVALID_ARGUMENT;
    *celsius = gpu.temperature_c;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetTemperatureV(nvmlDevice_t device, nvmlTemperature_v1_t *temperature)
{
    ENTER(device, SIM_NO_TEMPERATURE, temperature);
    if (temperature->version != NVML_STRUCT_VERSION(sizeof *temperature, 1))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    if (temperature->sensorType != NVML_TEMPERATURE_GPU)
        return NVML_ERROR_INVALID_ARGUMENT;
    temperature->temperature = (int)gpu.temperature_c;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetTemperatureThreshold(nvmlDevice_t device, unsigned int kind,
                                                           unsigned int *celsius)
{
    ENTER(device, SIM_NO_TEMPERATURE, celsius);
    switch (kind) {
    case NVML_TEMPERATURE_THRESHOLD_SHUTDOWN:
        *celsius = 92;
        return NVML_SUCCESS;
    case NVML_TEMPERATURE_THRESHOLD_SLOWDOWN:
        *celsius = 89;
        return NVML_SUCCESS;
    case NVML_TEMPERATURE_THRESHOLD_MEM_MAX:
        *celsius = 95;
        return NVML_SUCCESS;
    case NVML_TEMPERATURE_THRESHOLD_GPU_MAX:
        *celsius = 87;
        return NVML_SUCCESS;
    default:
        return NVML_ERROR_NOT_SUPPORTED;
    }
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    ENTER(device, SIM_NO_CLOCK_REASONS, reasons);
    *reasons = gpu.clock_reasons;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksEventReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    ENTER(device, SIM_NO_CLOCK_REASONS, reasons);
    *reasons = 0x1ff;
    return NVML_SUCCESS;
}

/* The older names of the two. */
NVML_EXPORT nvmlReturn_t nvmlDeviceGetCurrentClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    return nvmlDeviceGetCurrentClocksEventReasons(device, reasons);
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetSupportedClocksThrottleReasons(nvmlDevice_t device, unsigned long long *reasons)
{
    return nvmlDeviceGetSupportedClocksEventReasons(device, reasons);
}

/* Ranks on a CPU hold no GPU memory, so they are not shown: only what was put there. */
NVML_EXPORT nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count,
                                                                 nvmlProcessInfo_t *list)
{
    ENTER(device, 0, count);
    unsigned int room = *count;
    *count = gpu.process != 0;
    if (room < *count)
        return NVML_ERROR_INSUFFICIENT_SIZE;
    if (*count && !list)
        return NVML_ERROR_INVALID_ARGUMENT;
    if (*count)
        list[0] = (nvmlProcessInfo_t){gpu.process, PROCESS_MEMORY, NO_INSTANCE, NO_INSTANCE};
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetEccMode(nvmlDevice_t device, unsigned int *now, unsigned int *pending)
{
    ENTER(device, SIM_NO_ECC, now && pending);
    *now = *pending = NVML_FEATURE_ENABLED;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetTotalEccErrors(nvmlDevice_t device, unsigned int error, unsigned int counter,
                                                     unsigned long long *count)
{
    ENTER(device, SIM_NO_ECC, count);
    if (error > 1 || counter > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = gpu.ecc[error][counter];
    return NVML_SUCCESS;
}

/* All simulated errors are the memory's. */
NVML_EXPORT nvmlReturn_t nvmlDeviceGetMemoryErrorCounter(nvmlDevice_t device, unsigned int error, unsigned int counter,
                                                         unsigned int location, unsigned long long *count)
{
    ENTER(device, SIM_NO_ECC, count);
    if (error > 1 || counter > 1 || location >= NVML_MEMORY_LOCATION_COUNT)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = location == NVML_MEMORY_LOCATION_DEVICE_MEMORY ? gpu.ecc[error][counter] : 0;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetDetailedEccErrors(nvmlDevice_t device, unsigned int error, unsigned int counter,
                                                        nvmlEccErrorCounts_t *counts)
{
    ENTER(device, SIM_NO_ECC, counts);
    if (error > 1 || counter > 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    memset(counts, 0, sizeof *counts);
    counts->deviceMemory = gpu.ecc[error][counter];
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetRemappedRows(nvmlDevice_t device, unsigned int *corrected,
                                                   unsigned int *uncorrected, unsigned int *pending,
                                                   unsigned int *failure)
{
    ENTER(device, SIM_NO_REMAPPED_ROWS, corrected && uncorrected && pending && failure);
    *corrected = gpu.remapped_corrected;
    *uncorrected = gpu.remapped_uncorrected;
    *pending = gpu.remap_pending;
    *failure = gpu.remap_failure;
    return NVML_SUCCESS;
}

/* GPUs that remap rows do not retire pages. */
NVML_EXPORT nvmlReturn_t nvmlDeviceGetRetiredPagesPendingStatus(nvmlDevice_t device, unsigned int *pending)
{
    ENTER(device, 0, pending);
    return NVML_ERROR_NOT_SUPPORTED;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetPcieReplayCounter(nvmlDevice_t device, unsigned int *count)
{
    ENTER(device, SIM_NO_PCIE_REPLAY, count);
    *count = gpu.pcie_replays;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetNvLinkState(nvmlDevice_t device, unsigned int link, unsigned int *active)
{
    ENTER(device, SIM_NO_NVLINK, active);
    if (link >= gpu.nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    *active = gpu.nvlinks_up >> link & 1;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetNvLinkErrorCounter(nvmlDevice_t device, unsigned int link, unsigned int counter,
                                                         unsigned long long *count)
{
    ENTER(device, SIM_NO_NVLINK, count);
    if (link >= gpu.nvlinks || counter >= SIM_NVLINK_COUNTERS)
        return NVML_ERROR_INVALID_ARGUMENT;
    *count = driver_nvlink_errors(&gpu, link, counter);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetNvLinkRemoteDeviceType(nvmlDevice_t device, unsigned int link, unsigned int *type)
{
    ENTER(device, SIM_NO_NVLINK, type);
    if (link >= gpu.nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    *type = NVML_NVLINK_DEVICE_TYPE_SWITCH;
    return NVML_SUCCESS;
}

/* The other end is a switch, on a bus of its own. */
NVML_EXPORT nvmlReturn_t nvmlDeviceGetNvLinkRemotePciInfo_v2(nvmlDevice_t device, unsigned int link, nvmlPciInfo_t *pci)
{
    ENTER(device, SIM_NO_NVLINK, pci);
    if (link >= gpu.nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    memset(pci, 0, sizeof *pci);
    pci->bus = 0xe0 + link % 4;
    snprintf(pci->busIdLegacy, sizeof pci->busIdLegacy, "0000:%02X:00.0", pci->bus & 0xffu);
    snprintf(pci->busId, sizeof pci->busId, "00000000:%02X:00.0", pci->bus & 0xffu);
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfo(nvmlDevice_t device, nvmlGpuFabricInfo_t *info)
{
    ENTER(device, SIM_NO_FABRIC, info);
    memcpy(info->clusterUuid, gpu.fabric_cluster, sizeof info->clusterUuid);
    info->status = (nvmlReturn_t)gpu.fabric_status;
    info->cliqueId = gpu.fabric_clique;
    info->state = gpu.fabric_state;
    return NVML_SUCCESS;
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetGpuFabricInfoV(nvmlDevice_t device, nvmlGpuFabricInfo_v3_t *info)
{
    ENTER(device, SIM_NO_FABRIC, info);
    size_t size_v2 = offsetof(nvmlGpuFabricInfo_v3_t, healthSummary);
    if (info->version == NVML_STRUCT_VERSION(sizeof *info, 3))
        info->healthSummary = (unsigned char)gpu.fabric_summary;
    else if (info->version != NVML_STRUCT_VERSION(size_v2, 2))
        return NVML_ERROR_ARGUMENT_VERSION_MISMATCH;
    memcpy(info->clusterUuid, gpu.fabric_cluster, sizeof info->clusterUuid);
    info->status = (nvmlReturn_t)gpu.fabric_status;
    info->cliqueId = gpu.fabric_clique;
    info->state = gpu.fabric_state;
    info->healthMask = gpu.fabric_health;
    return NVML_SUCCESS;
}
