/* A stand-in for NVIDIA's driver library: the symbols of NVML that `cluster.gpus` reaches through pynvml.

   FAKE_NVML_INIT is what initialisation returns, FAKE_NVML_COUNT how many GPUs there are (at most 4), and
   FAKE_NVML_GPUS which ones, by their INDEX below, such as "13" for the two of one kind; without it the first.
   FAKE_NVML_STATE names a text file that is read again at every call, so that a test can change what happens:

     gpu INDEX used=BYTES util=PERCENT temp=CELSIUS throttle=BITS lost=CODE mig=INSTANCES memory2=0|1
     gpu INDEX unlisted=1|CODE memory=CODE    (1: its list of processes is empty; CODE: what is answered instead)
     process INDEX PID BYTES PERCENT          (BYTES -1: the driver does not tell; PERCENT likewise)

   Keys that a line leaves out are those of an idle GPU. Processes of a GPU with MIG are on its first instance. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    FUNCTION_NOT_FOUND = 13
};
enum { GPUS = 4, INSTANCES = 2, PROCESSES = 16 };

typedef unsigned long long Bytes;
typedef struct {
    const char *uuid, *name;
    Bytes total_bytes;
    int major, minor;
    int index, instance; /* instance -1: the whole GPU */
} Device;
typedef struct {
    Bytes total, free, used;
} Memory;
typedef struct {
    unsigned version;
    Bytes total, reserved, free, used;
} Memory2;
typedef struct {
    unsigned gpu, memory;
} Utilization;
typedef struct {
    unsigned pid;
    Bytes used;
    unsigned gpu_instance, compute_instance;
} Process;
typedef struct {
    unsigned pid;
    Bytes timestamp;
    unsigned sm, memory, encoder, decoder;
} ProcessUtilization;

static const Device devices[GPUS] = {
    {"GPU-aaaa1111-0000-0000-0000-000000000000", "NVIDIA H100 80GB HBM3", 85520809984ULL, 9, 0, 0, -1},
    {"GPU-aabb2222-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", 25757220864ULL, 8, 9, 1, -1},
    {"GPU-cccc3333-0000-0000-0000-000000000000", "Tesla T4", 15828320256ULL, 7, 5, 2, -1},
    {"GPU-dddd4444-0000-0000-0000-000000000000", "NVIDIA GeForce RTX 4090", 25757220864ULL, 8, 9, 3, -1},
};
static const Device instances[INSTANCES] = {
    {"MIG-aaaa1111-0000-0000-0000-000000000001", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42412802048ULL, 9, 0, 0, 0},
    {"MIG-aaaa1111-0000-0000-0000-000000000002", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42412802048ULL, 9, 0, 0, 1},
};
static int users = 0;

/* What the state file says of one GPU. */
typedef struct {
    Bytes used;
    unsigned util, temp, lost, mig, memory2, unlisted, memory;
    Bytes throttle;
    int count;
    long long pids[PROCESSES], bytes[PROCESSES], utils[PROCESSES];
} State;

static State state(int index) {
    State found = {0};
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    found.temp = 35;
    while (file && fgets(line, sizeof line, file)) {
        int of;
        long long pid, bytes, util;
        if (sscanf(line, "gpu %d", &of) == 1 && of == index) {
            for (char *word = strtok(line, " \n"); word; word = strtok(NULL, " \n")) {
                char *value = strchr(word, '=');
                if (!value) continue;
                Bytes number = strtoull(value + 1, NULL, 0);
                if (!strncmp(word, "used=", 5)) found.used = number;
                if (!strncmp(word, "util=", 5)) found.util = (unsigned)number;
                if (!strncmp(word, "temp=", 5)) found.temp = (unsigned)number;
                if (!strncmp(word, "throttle=", 9)) found.throttle = number;
                if (!strncmp(word, "lost=", 5)) found.lost = (unsigned)number;
                if (!strncmp(word, "mig=", 4)) found.mig = (unsigned)number;
                if (!strncmp(word, "memory2=", 8)) found.memory2 = (unsigned)number;
                if (!strncmp(word, "unlisted=", 9)) found.unlisted = (unsigned)number;
                if (!strncmp(word, "memory=", 7)) found.memory = (unsigned)number;
            }
        } else if (sscanf(line, "process %d %lld %lld %lld", &of, &pid, &bytes, &util) == 4 && of == index &&
                   found.count < PROCESSES) {
            found.pids[found.count] = pid;
            found.bytes[found.count] = bytes;
            found.utils[found.count++] = util;
        }
    }
    if (file) fclose(file);
    return found;
}

static unsigned number(const char *name, unsigned otherwise) {
    const char *value = getenv(name);
    return value ? (unsigned)atoi(value) : otherwise;
}

static unsigned gpus(void) {
    const char *which = getenv("FAKE_NVML_GPUS");
    return which ? (unsigned)strlen(which) : number("FAKE_NVML_COUNT", 3);
}

static int copy(char *target, unsigned length, const char *text) {
    if (strlen(text) >= length) return INSUFFICIENT_SIZE;
    strcpy(target, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    int result = (int)number("FAKE_NVML_INIT", SUCCESS);
    (void)flags;
    if (result == SUCCESS) users++;
    return result;
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

/* Says on standard error when the last user has gone, so that a test can tell. */
int nvmlShutdown(void) {
    if (users == 0) return UNINITIALIZED;
    if (--users == 0 && getenv("FAKE_NVML_SAY_SHUTDOWN")) fputs("nvml is shut down\n", stderr);
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length) { return copy(version, length, "580.65.06"); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    if (users == 0) return UNINITIALIZED;
    *count = gpus();
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, const Device **device) {
    if (users == 0) return UNINITIALIZED;
    const char *which = getenv("FAKE_NVML_GPUS");
    if (index >= gpus()) return INVALID_ARGUMENT;
    *device = &devices[which ? (unsigned)(which[index] - '0') : index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(const Device *device, char *uuid, unsigned length) {
    return copy(uuid, length, device->uuid);
}

/* The first thing asked of a handle that needs the GPU itself. */
int nvmlDeviceGetName(const Device *device, char *name, unsigned length) {
    State now = state(device->index);
    return now.lost ? (int)now.lost : copy(name, length, device->name);
}

int nvmlDeviceGetCudaComputeCapability(const Device *device, int *major, int *minor) {
    *major = device->major;
    *minor = device->minor;
    return SUCCESS;
}

static Bytes used_by(const Device *device) {
    return device->instance > 0 ? 0 : state(device->index).used;
}

int nvmlDeviceGetMemoryInfo(const Device *device, Memory *memory) {
    State now = state(device->index);
    if (now.lost || now.memory) return (int)(now.lost ? now.lost : now.memory);
    /* As the real one does, this counts what the driver keeps as used. */
    memory->total = device->total_bytes;
    memory->used = used_by(device) + (600ULL << 20);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo_v2(const Device *device, Memory2 *memory) {
    State now = state(device->index);
    if (now.lost || now.memory) return (int)(now.lost ? now.lost : now.memory);
    if (now.memory2) return FUNCTION_NOT_FOUND;
    memory->total = device->total_bytes;
    memory->reserved = 600ULL << 20;
    memory->used = used_by(device);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(const Device *device, Utilization *rates) {
    State now = state(device->index);
    if (now.lost) return (int)now.lost;
    if (device->instance >= 0) return NOT_SUPPORTED;
    rates->gpu = now.util;
    rates->memory = 0;
    return SUCCESS;
}

int nvmlDeviceGetTemperature(const Device *device, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    *celsius = state(device->index).temp;
    return SUCCESS;
}

int nvmlDeviceGetCurrentClocksEventReasons(const Device *device, Bytes *reasons) {
    *reasons = state(device->index).throttle;
    return SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(const Device *device, unsigned *count, Process *processes) {
    State now = state(device->index);
    unsigned room = processes ? *count : 0;
    if (now.lost) return (int)now.lost;
    if (now.unlisted > 1) return (int)now.unlisted;
    if (device->instance > 0 || now.unlisted) now.count = 0;
    *count = (unsigned)now.count;
    if (now.count == 0) return SUCCESS;
    if (room < (unsigned)now.count) return INSUFFICIENT_SIZE;
    for (int i = 0; i < now.count; i++)
        processes[i] = (Process){(unsigned)now.pids[i], (Bytes)now.bytes[i], 0, 0};
    return SUCCESS;
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(const Device *device, unsigned *count, Process *processes) {
    (void)device, (void)processes;
    *count = 0;
    return SUCCESS;
}

int nvmlDeviceGetProcessUtilization(const Device *device, ProcessUtilization *samples, unsigned *count,
                                    Bytes since) {
    State now = state(device->index);
    unsigned room = samples ? *count : 0, told = 0;
    (void)since;
    if (device->instance >= 0 || now.unlisted) return NOT_SUPPORTED;
    for (int i = 0; i < now.count; i++) {
        if (now.utils[i] < 0) continue;
        if (told < room) samples[told] = (ProcessUtilization){(unsigned)now.pids[i], 1, (unsigned)now.utils[i], 0, 0, 0};
        told++;
    }
    *count = told;
    if (told == 0) return NOT_FOUND;
    return room < told ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetMigMode(const Device *device, unsigned *current, unsigned *pending) {
    if (device->major < 8 || device->minor == 9) return NOT_SUPPORTED;
    *current = *pending = state(device->index).mig > 0;
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(const Device *device, unsigned *count) {
    (void)device;
    *count = 7;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(const Device *device, unsigned index, const Device **instance) {
    if (index >= state(device->index).mig || index >= INSTANCES) return NOT_FOUND;
    *instance = &instances[index];
    return SUCCESS;
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(const Device *instance, const Device **device) {
    *device = &devices[instance->index];
    return SUCCESS;
}

const char *nvmlErrorString(int result) { return result == SUCCESS ? "Success" : "Fake error"; }
