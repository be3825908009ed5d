/* nvmlDeviceGetFieldValues: many values in one call, each with its own result. */
#include <time.h>

#include "driver.h"

enum { DL_REPLAY, DL_RECOVERY, DL_CRC_FLIT, DL_CRC_DATA, DL_ECC_DATA };

unsigned long long driver_nvlink_errors(const struct sim_gpu *gpu, unsigned int link, unsigned int counter)
{
    if (link < gpu->nvlinks)
        return gpu->nvlink_errors[link][counter];
    unsigned long long total = 0;
    for (uint32_t one = 0; one < gpu->nvlinks; one++)
        total += gpu->nvlink_errors[one][counter];
    return total;
}

static nvmlReturn_t small(nvmlFieldValue_t *field, unsigned int value)
{
    field->valueType = NVML_VALUE_TYPE_UNSIGNED_INT;
    field->value.uiVal = value;
    return NVML_SUCCESS;
}

static nvmlReturn_t large(nvmlFieldValue_t *field, unsigned long long value)
{
    field->valueType = NVML_VALUE_TYPE_UNSIGNED_LONG_LONG;
    field->value.ullVal = value;
    return NVML_SUCCESS;
}

/* The scope of a link's field is the link, or UINT_MAX for all of them. */
static nvmlReturn_t link_errors(const struct sim_gpu *gpu, nvmlFieldValue_t *field, unsigned int counter)
{
    unsigned int link = field->scopeId;
    if (link != UINT32_MAX && link >= gpu->nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    return large(field, driver_nvlink_errors(gpu, link, counter));
}

static nvmlReturn_t link_state(const struct sim_gpu *gpu, nvmlFieldValue_t *field)
{
    if (field->scopeId >= gpu->nvlinks)
        return NVML_ERROR_INVALID_ARGUMENT;
    return small(field, gpu->nvlinks_up >> field->scopeId & 1);
}

/* The feature that a field belongs to, 0 for a field that is not simulated. */
static uint64_t feature_of(unsigned int id)
{
    switch (id) {
    case NVML_FI_DEV_ECC_CURRENT:
    case NVML_FI_DEV_ECC_PENDING:
    case NVML_FI_DEV_ECC_SBE_VOL_TOTAL:
    case NVML_FI_DEV_ECC_DBE_VOL_TOTAL:
    case NVML_FI_DEV_ECC_SBE_AGG_TOTAL:
    case NVML_FI_DEV_ECC_DBE_AGG_TOTAL:
        return SIM_NO_ECC;
    case NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL:
    case NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL:
    case NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL:
    case NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL:
    case NVML_FI_DEV_NVLINK_ECC_DATA_ERROR_COUNT_TOTAL:
    case NVML_FI_DEV_NVLINK_LINK_COUNT:
    case NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY:
    case NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY:
    case NVML_FI_DEV_NVLINK_ERROR_DL_CRC:
    case NVML_FI_DEV_NVLINK_GET_STATE:
        return SIM_NO_NVLINK;
    case NVML_FI_DEV_PCIE_REPLAY_COUNTER:
        return SIM_NO_PCIE_REPLAY;
    case NVML_FI_DEV_REMAPPED_COR:
    case NVML_FI_DEV_REMAPPED_UNC:
    case NVML_FI_DEV_REMAPPED_PENDING:
    case NVML_FI_DEV_REMAPPED_FAILURE:
        return SIM_NO_REMAPPED_ROWS;
    case NVML_FI_DEV_GET_GPU_RECOVERY_ACTION:
        return SIM_NO_RECOVERY_ACTION;
    default:
        return 0;
    }
}

static nvmlReturn_t read_field(const struct sim_gpu *gpu, nvmlFieldValue_t *field)
{
    uint64_t feature = feature_of(field->fieldId);
    if (!feature || gpu->unsupported & feature)
        return NVML_ERROR_NOT_SUPPORTED;
    if (gpu->reset_required && field->fieldId != NVML_FI_DEV_GET_GPU_RECOVERY_ACTION)
        return NVML_ERROR_RESET_REQUIRED;
    switch (field->fieldId) {
    case NVML_FI_DEV_ECC_CURRENT:
    case NVML_FI_DEV_ECC_PENDING:
        return small(field, NVML_FEATURE_ENABLED);
    case NVML_FI_DEV_ECC_SBE_VOL_TOTAL:
        return large(field, gpu->ecc[0][0]);
    case NVML_FI_DEV_ECC_DBE_VOL_TOTAL:
        return large(field, gpu->ecc[1][0]);
    case NVML_FI_DEV_ECC_SBE_AGG_TOTAL:
        return large(field, gpu->ecc[0][1]);
    case NVML_FI_DEV_ECC_DBE_AGG_TOTAL:
        return large(field, gpu->ecc[1][1]);
    case NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL:
        return large(field, driver_nvlink_errors(gpu, UINT32_MAX, DL_CRC_FLIT));
    case NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL:
        return large(field, driver_nvlink_errors(gpu, UINT32_MAX, DL_CRC_DATA));
    case NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL:
        return large(field, driver_nvlink_errors(gpu, UINT32_MAX, DL_REPLAY));
    case NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL:
        return large(field, driver_nvlink_errors(gpu, UINT32_MAX, DL_RECOVERY));
    case NVML_FI_DEV_NVLINK_ECC_DATA_ERROR_COUNT_TOTAL:
        return large(field, driver_nvlink_errors(gpu, UINT32_MAX, DL_ECC_DATA));
    case NVML_FI_DEV_NVLINK_LINK_COUNT:
        return small(field, gpu->nvlinks);
    case NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY:
        return link_errors(gpu, field, DL_REPLAY);
    case NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY:
        return link_errors(gpu, field, DL_RECOVERY);
    case NVML_FI_DEV_NVLINK_ERROR_DL_CRC:
        return link_errors(gpu, field, DL_CRC_FLIT);
    case NVML_FI_DEV_NVLINK_GET_STATE:
        return link_state(gpu, field);
    case NVML_FI_DEV_PCIE_REPLAY_COUNTER:
        return small(field, gpu->pcie_replays);
    case NVML_FI_DEV_REMAPPED_COR:
        return small(field, gpu->remapped_corrected);
    case NVML_FI_DEV_REMAPPED_UNC:
        return small(field, gpu->remapped_uncorrected);
    case NVML_FI_DEV_REMAPPED_PENDING:
        return small(field, gpu->remap_pending);
    case NVML_FI_DEV_REMAPPED_FAILURE:
        return small(field, gpu->remap_failure);
    default:
        return small(field, gpu->recovery_action);
    }
}

NVML_EXPORT nvmlReturn_t nvmlDeviceGetFieldValues(nvmlDevice_t device, int count, nvmlFieldValue_t *values)
{
    struct sim_gpu gpu;
    struct timespec now;
    if (!values || count < 1)
        return NVML_ERROR_INVALID_ARGUMENT;
    nvmlReturn_t result = driver_enter(device, DRIVER_AFTER_RESET_REQUIRED, &gpu);
    if (result == NVML_SUCCESS && gpu.error)
        result = (nvmlReturn_t)gpu.error;
    if (result != NVML_SUCCESS)
        return result;
    clock_gettime(CLOCK_REALTIME, &now);
    for (int i = 0; i < count; i++) {
        values[i].timestamp = (long long)now.tv_sec * 1000000 + now.tv_nsec / 1000;
        values[i].latencyUsec = 0;
        values[i].value.ullVal = 0;
        values[i].nvmlReturn = read_field(&gpu, &values[i]);
    }
    return NVML_SUCCESS;
}
