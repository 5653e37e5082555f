/* Test aid: a libnvinfer.so.11 in front of TensorRT-RTX. See ../trt_shim.py, which sets BUILDER_LIBRARY, PARSER_LIBRARY,
 * MAJOR, MINOR, PATCH and BUILD, and may set CRASH (a native crash when a builder is made) or SILENT (no version). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

static void *library(const char *path) {
  void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (handle == NULL) {
    fprintf(stderr, "shim: %s\n", dlerror());
    abort();
  }
  return handle;
}

static void *symbol(const char *path, const char *name) {
  void *address = dlsym(library(path), name);
  if (address == NULL) {
    fprintf(stderr, "shim: %s\n", dlerror());
    abort();
  }
  return address;
}

/* A factory refuses a caller that was compiled for another version than its own: tell it what it wants to hear. */
static int own_version(void) { return ((int (*)(void))symbol(BUILDER_LIBRARY, "getInferLibVersion"))(); }

#define FACTORY_1(path, name)                                                                   \
  void *name(void *logger, int version) {                                                       \
    (void)version;                                                                              \
    return ((void *(*)(void *, int))symbol(path, #name))(logger, own_version());                \
  }
#define FACTORY_2(path, name)                                                                   \
  void *name(void *subject, void *logger, int version) {                                        \
    (void)version;                                                                              \
    return ((void *(*)(void *, void *, int))symbol(path, #name))(subject, logger, own_version()); \
  }

#ifdef CRASH
void *createInferBuilder_INTERNAL(void *logger, int version) {
  (void)logger;
  *(volatile int *)8 = version;
  return NULL;
}
#else
FACTORY_1(BUILDER_LIBRARY, createInferBuilder_INTERNAL)
#endif
FACTORY_1(BUILDER_LIBRARY, createInferRuntime_INTERNAL)
FACTORY_2(BUILDER_LIBRARY, createInferRefitter_INTERNAL)
FACTORY_2(PARSER_LIBRARY, createNvOnnxParser_INTERNAL)
FACTORY_2(PARSER_LIBRARY, createNvOnnxParserRefitter_INTERNAL)

void *getPluginRegistry(void) { return ((void *(*)(void))symbol(BUILDER_LIBRARY, "getPluginRegistry"))(); }
void *getBuilderPluginRegistry(int capability) {
  return ((void *(*)(int))symbol(BUILDER_LIBRARY, "getBuilderPluginRegistry"))(capability);
}
int initLibNvInferPlugins(void *logger, const char *name_space) { return logger != NULL || name_space != NULL; }

int getNvOnnxParserVersion(void) { return MAJOR * 10000 + MINOR * 100 + PATCH; }
#ifndef SILENT
int getInferLibVersion(void) { return MAJOR * 10000 + MINOR * 100 + PATCH; }
int getInferLibMajorVersion(void) { return MAJOR; }
int getInferLibMinorVersion(void) { return MINOR; }
int getInferLibPatchVersion(void) { return PATCH; }
int getInferLibBuildVersion(void) { return BUILD; }
#endif
