/* The state of the simulated GPUs: one file, mapped by everyone who uses it.
 *
 * Layout (version SIM_LAYOUT, little endian, natural alignment): struct sim_state below, nothing after it.
 *
 * Writers hold an exclusive flock on the file, which the kernel releases when one dies. Each GPU's record is guarded by
 * a sequence number, odd while the record is being written: readers copy, and copy again if it changed meanwhile, and
 * only one who waits long for an odd number to change takes the lock too (its writer has died half-way; the record is
 * then mended by the next write). Events go into a ring, oldest overwritten; an entry's number is 0 while it is written.
 * Every change ends with a new value of `changes`, a futex that all waiters sleep on.
 *
 * What the driver answers:
 *   lost, or flapping and in a lost half-period   NVML_ERROR_GPU_IS_LOST from every call with its handle; nvmlInit
 *                                                 leaves it out, so that indices close up
 *   generation other than at nvmlInit (replaced)  the same, until NVML is initialised again
 *   hang                                          every call with its handle, or for its handle, waits until it is
 *                                                 healed or replaced; nvmlEventSetWait does not touch GPUs and goes on
 *   latency_ms                                    every such call sleeps first
 *   reset_required                                NVML_ERROR_RESET_REQUIRED, apart from identity (index, UUID, name,
 *                                                 PCI, minor number) and the recovery action (field 230)
 *   error                                         that nvmlReturn_t, apart from identity
 *   unsupported                                   NVML_ERROR_NOT_SUPPORTED, per value in nvmlDeviceGetFieldValues
 * Where several hold, the order is: latency, hang, lost, reset required, error, not supported.
 */
#ifndef ELASTIC_SIMULATOR_STATE_H
#define ELASTIC_SIMULATOR_STATE_H

#include <stdbool.h>
#include <stdint.h>

#define SIM_MAGIC UINT64_C(0x314d49534c4d564e) /* "NVMLSIM1" */
#define SIM_LAYOUT 1
#define SIM_MAX_GPUS 72
#define SIM_NVLINKS 18
#define SIM_NVLINK_COUNTERS 5 /* as nvmlNvLinkErrorCounter_t: replay, recovery, CRC flit, CRC data, ECC data */
#define SIM_EVENT_SLOTS 1024

enum {
    SIM_NO_ECC = 1 << 0,
    SIM_NO_REMAPPED_ROWS = 1 << 1,
    SIM_NO_RECOVERY_ACTION = 1 << 2,
    SIM_NO_NVLINK = 1 << 3,
    SIM_NO_FABRIC = 1 << 4,
    SIM_NO_PCIE_REPLAY = 1 << 5,
    SIM_NO_CLOCK_REASONS = 1 << 6,
    SIM_NO_TEMPERATURE = 1 << 7,
    SIM_NO_EVENTS = 1 << 8,
    SIM_NO_NEW_EVENTS = 1 << 9, /* GPU unavailable, recovery action */
};

struct sim_gpu {
    char uuid[48]; /* both end with a zero byte */
    char name[64];
    uint32_t generation; /* how many GPUs this place has had */
    uint32_t spare;      /* bound to no rank at first; for display */
    uint32_t lost;
    uint32_t reset_required;
    uint32_t hang;
    uint32_t latency_ms;
    uint64_t flap_start_ns;  /* CLOCK_MONOTONIC */
    uint64_t flap_period_ns; /* 0: does not flap */
    uint64_t unsupported;    /* SIM_NO_* */
    uint64_t clock_reasons;  /* nvmlClocksEventReason* */
    uint64_t memory_total;   /* bytes */
    uint64_t memory_used;
    uint64_t ecc[2][2]; /* [corrected, uncorrected][volatile, aggregate] */
    uint32_t temperature_c;
    uint32_t power_mw;
    uint32_t utilization_percent;
    uint32_t recovery_action; /* NVML_GPU_RECOVERY_ACTION_* */
    uint32_t remapped_corrected;
    uint32_t remapped_uncorrected;
    uint32_t remap_pending;
    uint32_t remap_failure;
    uint32_t pcie_replays;
    uint32_t nvlinks;
    uint64_t nvlinks_up; /* one bit a link */
    uint64_t nvlink_errors[SIM_NVLINKS][SIM_NVLINK_COUNTERS];
    uint32_t fabric_state;  /* NVML_GPU_FABRIC_STATE_* */
    uint32_t fabric_status; /* nvmlReturn_t */
    uint32_t fabric_clique;
    uint32_t fabric_health;  /* NVML_GPU_FABRIC_HEALTH_MASK_* */
    uint32_t fabric_summary; /* NVML_GPU_FABRIC_HEALTH_SUMMARY_* */
    uint32_t error;          /* nvmlReturn_t, 0 for none */
    uint32_t process;        /* pid of one that computes on it, 0: none */
    uint8_t fabric_cluster[16];
};

struct sim_slot {
    uint32_t sequence; /* odd: being written */
    uint32_t reserved;
    struct sim_gpu gpu;
};

struct sim_event {
    uint64_t number; /* from 1; 0: being written, or never written */
    uint32_t gpu;    /* place in `slots` */
    uint32_t generation;
    uint64_t type; /* one nvmlEventType* bit */
    uint64_t data;
};

struct sim_state {
    uint64_t magic; /* written last when a file is made */
    uint32_t layout;
    uint32_t size; /* sizeof(struct sim_state) */
    uint32_t gpus;
    uint32_t changes; /* futex */
    uint64_t events;  /* number of the latest event */
    struct sim_slot slots[SIM_MAX_GPUS];
    struct sim_event ring[SIM_EVENT_SLOTS];
};

/* One mapping of a state file. */
struct sim_map {
    struct sim_state *state;
    int fd;
};

/* 0, or an errno: EPROTO for a file of another layout, EINVAL for one that is none of ours. */
int sim_attach(struct sim_map *map, const char *path, bool writable);
void sim_detach(struct sim_map *map);

/* A consistent copy of a GPU's record, for one who does not hold the lock. */
void sim_read(const struct sim_map *map, uint32_t gpu, struct sim_gpu *copy);

bool sim_lost(const struct sim_gpu *gpu, uint64_t now_ns);
uint64_t sim_now_ns(void);

/* Sleeps until `changes` differs from `seen`, or `deadline_ns` of CLOCK_MONOTONIC (UINT64_MAX: for ever). */
uint32_t sim_changes(const struct sim_map *map);
void sim_wait(const struct sim_map *map, uint32_t seen, uint64_t deadline_ns);

#endif
