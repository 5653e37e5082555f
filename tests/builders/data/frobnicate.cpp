/* Test aid: a library of one TensorRT plugin, `Frobnicate`, which gives its input's type and shape. Built without
 * TensorRT's headers: the classes below have the virtual functions of NvInfer's in its order.
 * Source: NvInferRuntime.h and NvInferPluginBase.h, TensorRT 10.0 to 11.
 *
 * getCreators gives the plugin to IPluginRegistry::loadLibrary. With SELF_REGISTERING there is no such function, and the
 * library registers the plugin when it is loaded, as REGISTER_TENSORRT_PLUGIN does. */
#include <cstddef>
#include <cstdint>

struct InterfaceInfo {
  char const *kind;
  int32_t major, minor;
};
struct Fields {
  int32_t count;
  void const *fields;
};
struct Exprs {
  int32_t rank;
  void const *dims[8];
};
struct Desc {
  int32_t rank;
  int64_t dims[8];
  int32_t type, format;
  float scale;
};
struct DynamicDesc {
  Desc desc;
  int64_t ranges[27];
};

struct Versioned {
  virtual int32_t getAPILanguage() const noexcept { return 0; }
  virtual InterfaceInfo getInterfaceInfo() const noexcept = 0;
  virtual ~Versioned() noexcept = default;
};

struct Core : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_CORE", 1, 0}; }
  virtual char const *getPluginName() const noexcept { return "Frobnicate"; }
  virtual char const *getPluginVersion() const noexcept { return "1"; }
  virtual char const *getPluginNamespace() const noexcept { return ""; }
};

struct Build : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_BUILD", 1, 0}; }
  virtual int32_t configurePlugin(DynamicDesc const *, int32_t, DynamicDesc const *, int32_t) noexcept { return 0; }
  virtual int32_t getOutputDataTypes(int32_t *out, int32_t, int32_t const *in, int32_t) const noexcept {
    return out[0] = in[0], 0;
  }
  virtual int32_t getOutputShapes(Exprs const *in, int32_t, Exprs const *, int32_t, Exprs *out, int32_t,
                                  void *) noexcept {
    return out[0] = in[0], 0;
  }
  virtual bool supportsFormatCombination(int32_t position, DynamicDesc const *all, int32_t, int32_t) noexcept {
    return all[position].desc.type == 0 && all[position].desc.format == 0;
  }
  virtual int32_t getNbOutputs() const noexcept { return 1; }
  virtual size_t getWorkspaceSize(DynamicDesc const *, int32_t, DynamicDesc const *, int32_t) const noexcept {
    return 0;
  }
  virtual int32_t getValidTactics(int32_t *, int32_t) noexcept { return 0; }
  virtual int32_t getNbTactics() noexcept { return 0; }
  virtual char const *getTimingCacheID() noexcept { return nullptr; }
  virtual int32_t getFormatCombinationLimit() noexcept { return 1; }
  virtual char const *getMetadataString() noexcept { return nullptr; }
};

struct Plugin;

struct Runtime : Versioned {
  explicit Runtime(Plugin *owner) : plugin(owner) {}
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN_V3ONE_RUNTIME", 1, 0}; }
  virtual int32_t setTactic(int32_t) noexcept { return 0; }
  virtual int32_t onShapeChange(Desc const *, int32_t, Desc const *, int32_t) noexcept { return 0; }
  virtual int32_t enqueue(Desc const *, Desc const *, void const *const *, void *const *, void *, void *) noexcept {
    return 0;
  }
  virtual Plugin *attachToContext(void *) noexcept { return plugin; }
  virtual Fields const *getFieldsToSerialize() noexcept {
    static Fields const none{0, nullptr};
    return &none;
  }
  Plugin *plugin;
};

struct Plugin : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN", 1, 0}; }
  virtual Versioned *getCapabilityInterface(int32_t type) noexcept {
    Versioned *parts[] = {&core, &build, &runtime};
    return parts[type];
  }
  virtual Plugin *clone() noexcept { return new Plugin; }
  Core core;
  Build build;
  Runtime runtime{this};
};

struct Creator : Versioned {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"PLUGIN CREATOR_V3ONE", 1, 0}; }
  virtual Plugin *createPlugin(char const *, Fields const *, int32_t) noexcept { return new Plugin; }
  virtual Fields const *getFieldNames() noexcept {
    static Fields const none{0, nullptr};
    return &none;
  }
  virtual char const *getPluginName() const noexcept { return "Frobnicate"; }
  virtual char const *getPluginVersion() const noexcept { return "1"; }
  virtual char const *getPluginNamespace() const noexcept { return ""; }
};

static Creator creator;

#ifdef SELF_REGISTERING
struct Registry {
  virtual ~Registry() noexcept = 0;
  virtual void setErrorRecorder(void *) noexcept = 0;
  virtual void *getErrorRecorder() const noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool) = 0;
  virtual void *loadLibrary(char const *) noexcept = 0;
  virtual void deregisterLibrary(void *) noexcept = 0;
  virtual bool registerCreator(Versioned &, char const *) noexcept = 0;
};
extern "C" Registry *getPluginRegistry() noexcept;
static bool const is_registered = getPluginRegistry()->registerCreator(creator, "");
#else
extern "C" void setLoggerFinder(void *) {}
extern "C" Versioned *const *getCreators(int32_t &count) {
  static Versioned *const creators[] = {&creator};
  count = 1;
  return creators;
}
#endif
