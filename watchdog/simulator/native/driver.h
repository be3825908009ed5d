/* What the files of the driver library share. */
#ifndef ELASTIC_SIMULATOR_DRIVER_H
#define ELASTIC_SIMULATOR_DRIVER_H

#include <stdbool.h>

#include "nvml.h"
#include "state.h"

/* A handle is the address of an entry of one table, with a place for every GPU, so that it stays what it was over
 * initialising NVML again. */
struct nvmlDevice_st {
    uint32_t slot;
    uint32_t generation; /* of the GPU that was there at nvmlInit */
    uint32_t index;
    bool present; /* was there at nvmlInit */
};

/* NULL unless NVML is initialised. A mapping is never undone: a call that hangs may be using it. */
struct sim_map *driver_map(void);

nvmlDevice_t driver_device(uint32_t slot);

enum { DRIVER_AFTER_RESET_REQUIRED = 1 << 31 }; /* answers also while a reset is required */

/* Begins a call with a handle: waits as the GPU's faults say, and copies its record. `needs`: SIM_NO_* bits of features
 * without which the call answers NOT_SUPPORTED, and DRIVER_*. */
nvmlReturn_t driver_enter(nvmlDevice_t device, uint32_t needs, struct sim_gpu *gpu);

nvmlReturn_t driver_give_text(const char *text, char *buffer, unsigned int length);

/* Errors of one kind: on one link, or on all of them where `link` is none. */
unsigned long long driver_nvlink_errors(const struct sim_gpu *gpu, unsigned int link, unsigned int counter);

#endif
