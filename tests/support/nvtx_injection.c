/* A tool that listens to NVTX: writes each range that opens or closes as a line to the file DEEPFUSE_NVTX_LOG.
 *
 *     push <tab> domain <tab> color <tab> category <tab> name
 *     pop <tab> domain
 *
 * Of the interface between NVTX and tools only what is used here is declared, with the layouts, numbers and names of
 * nvtx3/nvToolsExt.h and nvtx3/nvtxDetail/nvtxTypes.h (https://github.com/NVIDIA/NVTX, release 3.2, Apache-2.0 WITH
 * LLVM-exception). NVTX loads the library that NVTX_INJECTION64_PATH names, at its first call.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    uint16_t version;
    uint16_t size;
    uint32_t category;
    int32_t color_type;
    uint32_t color;
    int32_t payload_type;
    int32_t reserved;
    uint64_t payload;
    int32_t message_type;
    union {
        const char *ascii;
        const void *registered;
    } message;
} event_attributes;
enum { MESSAGE_ASCII = 1, MESSAGE_REGISTERED = 3 };

typedef void (*function)(void);
typedef struct {
    size_t struct_size;
    int (*get_module_function_table)(int module, function ***table, unsigned *size);
} callbacks_table;
typedef const void *(*get_export_table)(uint32_t id);
enum { CALLBACKS = 1 };
enum { MODULE_CORE = 1, MODULE_CORE2 = 5 };
enum { CORE_RANGE_PUSH_A = 9, CORE_RANGE_POP = 11 };
enum {
    CORE2_RANGE_PUSH_EX = 4,
    CORE2_RANGE_POP = 5,
    CORE2_NAME_CATEGORY_A = 8,
    CORE2_REGISTER_STRING_A = 10,
    CORE2_DOMAIN_CREATE_A = 12
};

#define CATEGORIES 64
typedef struct {
    char *name;
    char *categories[CATEGORIES];
} domain;

static FILE *out;

static int push_a(const char *name) {
    fprintf(out, "push\t\t\t\t%s\n", name);
    return fflush(out);
}

static int pop(void) {
    fprintf(out, "pop\t\n");
    return fflush(out);
}

static int domain_push(domain *d, const event_attributes *event) {
    const char *category = event->category < CATEGORIES ? d->categories[event->category] : NULL;
    /* a registered string is what register_string gave */
    const char *name = event->message_type == MESSAGE_REGISTERED ? event->message.registered : event->message.ascii;
    fprintf(out, "push\t%s\t%08x\t%s\t%s\n", d->name, event->color, category ? category : "", name);
    return fflush(out);
}

static int domain_pop(domain *d) {
    fprintf(out, "pop\t%s\n", d->name);
    return fflush(out);
}

static void name_category(domain *d, uint32_t category, const char *name) {
    if (category < CATEGORIES) d->categories[category] = strdup(name);
}

static void *register_string(domain *d, const char *string) {
    (void)d;
    return strdup(string);
}

static domain *create_domain(const char *name) {
    domain *d = calloc(1, sizeof *d);
    d->name = strdup(name);
    return d;
}

int InitializeInjectionNvtx2(get_export_table tables) {
    const callbacks_table *callbacks = tables(CALLBACKS);
    function **core, **core2;
    unsigned size;
    const char *path = getenv("DEEPFUSE_NVTX_LOG");
    if (!out) out = path ? fopen(path, "a") : NULL;
    if (!out || !callbacks->get_module_function_table(MODULE_CORE, &core, &size)) return 0;
    if (!callbacks->get_module_function_table(MODULE_CORE2, &core2, &size)) return 0;
    *core[CORE_RANGE_PUSH_A] = (function)push_a;
    *core[CORE_RANGE_POP] = (function)pop;
    *core2[CORE2_RANGE_PUSH_EX] = (function)domain_push;
    *core2[CORE2_RANGE_POP] = (function)domain_pop;
    *core2[CORE2_NAME_CATEGORY_A] = (function)name_category;
    *core2[CORE2_REGISTER_STRING_A] = (function)register_string;
    *core2[CORE2_DOMAIN_CREATE_A] = (function)create_domain;
    return 1;
}
