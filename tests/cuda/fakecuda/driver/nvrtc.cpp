// NVRTC: CUDA C compiled by g++ behind device.h. CuPy keeps what comes out in its own cache on disk.

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <regex>
#include <sstream>

#include "state.h"

using namespace fake;

struct Program {
  std::string source, log, ptx, cubin;
  std::vector<std::string> expressions;
};

static std::string compiler, headers, scratch, headers_digest;

API void fakecuda_compiler(const char* command, const char* include, const char* folder, const char* digest) {
  compiler = command, headers = include, scratch = folder, headers_digest = digest;
}

static std::string slurp(const std::string& path) {
  std::stringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

// The source with what g++ wants otherwise, and the table of its kernels.
static std::string unit(const Program& program, bool flush, bool cupys) {
  const std::regex shared(R"(extern\s+__shared__\s+([\w\s]+?)\s+(\w+)\s*\[\s*\]\s*;)");
  std::string text =
      std::regex_replace(program.source, shared, "auto* const $2 = reinterpret_cast<$1*>(fake_block->shared);");
  std::set<std::string> names(program.expressions.begin(), program.expressions.end());
  const std::regex kernel(R"(extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?(\w+)\s*\()");
  for (std::sregex_iterator it(text.begin(), text.end(), kernel), end; it != end; ++it) names.insert((*it)[1]);
  // __cluster_dims__ of the kernel that a name is an instance of
  const auto cluster = [&text](const std::string& name) {
    const std::string kernel = name.substr(0, name.find('<'));
    std::smatch found;
    const std::regex dims(R"(__cluster_dims__\((\d+)[^{;]*?\b)" + kernel + R"(\()");
    return std::regex_search(text, found, dims) ? found[1].str() : "1";
  };
  const bool fibers = std::regex_search(text, std::regex("__syncthreads|__shfl_|__syncwarp"));
  text += "\n#undef threadIdx\n#define FAKE_API extern \"C\" __attribute__((visibility(\"default\")))\n";
  text += "FAKE_API const FakeKernel* fake_kernels() {\n  static const FakeKernel all[] = {\n";
  for (const std::string& name : names) text += "    fake_kernel(\"" + name + "\", &" + name + ", " + cluster(name) + "),\n";
  text += "    {}};\n  return all;\n}\nFAKE_API int fake_flags[3]; int fake_flags[3] = {";
  return text + std::to_string(fibers) + ", " + std::to_string(flush) + ", " + std::to_string(!cupys) + "};\n";
}

// device.h, and all that CuPy's own kernels start with, compiled once.
static std::string precompiled(const std::string& command, bool cupys) {
  const std::string words = command + headers_digest + std::to_string(cupys);
  const std::string at = scratch + "/header" + std::to_string(std::hash<std::string>()(words));
  if (access((at + "/all.h.gch").c_str(), R_OK)) {
    const std::string mine = at + "." + std::to_string(getpid());
    mkdir(mine.c_str(), 0700);
    std::ofstream(mine + "/all.h") << "#include \"device.h\"\n"
                                   << (cupys ? "#include <cupy/complex.cuh>\n#include <cupy/carray.cuh>\n"
                                               "#include <cupy/atomics.cuh>\n#include <cupy/math_constants.h>\n"
                                             : "");
    if (system((command + " -x c++-header " + mine + "/all.h -o " + mine + "/all.h.gch >/dev/null 2>&1").c_str()))
      return "device.h";
    if (rename(mine.c_str(), at.c_str()) && access((at + "/all.h.gch").c_str(), R_OK)) return "device.h";
  }
  return at + "/all.h";
}

API int nvrtcCompileProgram(Program* program, int n, const char* const* options) {
  std::string flags;
  bool contract = true, flush = false;
  for (int i = 0; i < n; ++i) {
    const std::string option = options[i];
    const size_t standard = option.find("std=");
    if (option.substr(0, 2) == "-I" || option.substr(0, 2) == "-D") flags += " '" + option + "'";
    if (standard != std::string::npos) flags += " -std=" + option.substr(standard + 4);
    if (option.find("fmad=false") != std::string::npos) contract = false;
    if (option.find("ftz=true") != std::string::npos) flush = true;
  }
  program->ptx = "// " + headers_digest + compiler;  // CuPy's cache goes by this
  if (program->source.empty()) return 0;
  std::string command = compiler + " -I'" + headers + "'" + flags;
  const bool cupys = program->source.find("#include <cupy/complex.cuh>") != std::string::npos;
  // a device contracts a*b + c unless it is told not to; CuPy's own kernels are as good without
  command += contract && !cupys ? " -mfma -ffp-contract=fast" : " -ffp-contract=off";
  std::string folder = scratch + "/nvrtcXXXXXX";
  if (!mkdtemp(&folder[0])) return 1;
  std::ofstream(folder + "/k.cpp") << unit(*program, flush, cupys);
  const std::string header = precompiled(command, cupys);
  const int failed = system((command + " -include " + header + " " + folder + "/k.cpp -shared -o " + folder +
                             "/k.so > " + folder + "/log 2>&1")
          .c_str());
  program->log = slurp(folder + "/log");
  const std::string library = slurp(folder + "/k.so");
  const u64 size = library.size();
  program->cubin = "FAKECUBN" + std::string((const char*)&size, 8) + library;
  for (const char* file : {"/k.cpp", "/k.so", "/log"}) unlink((folder + file).c_str());
  rmdir(folder.c_str());
  return failed ? 6 : 0;
}

API const char* nvrtcGetErrorString(int error) { return error ? "NVRTC_ERROR_COMPILATION" : "NVRTC_SUCCESS"; }
API int nvrtcVersion(int* major, int* minor) {
  return *major = settings.version / 1000, *minor = settings.version % 1000 / 10, 0;
}
API int nvrtcGetNumSupportedArchs(int* n) { return *n = 5, 0; }
API int nvrtcGetSupportedArchs(int* out) {
  for (int capability : {75, 80, 90, 100, 120}) *out++ = capability;
  return 0;
}
API int nvrtcCreateProgram(
    Program** out, const char* source, const char*, int, const char* const*, const char* const*) {
  return *out = new Program{source}, 0;
}
API int nvrtcDestroyProgram(Program** program) { return delete *program, *program = nullptr, 0; }
API int nvrtcAddNameExpression(Program* program, const char* name) { return program->expressions.push_back(name), 0; }
API int nvrtcGetLoweredName(Program* program, const char* name, const char** out) {
  for (const std::string& one : program->expressions)
    if (one == name) return *out = one.c_str(), 0;
  return 9;
}
#define TEXT(Name, member, extra)                                                                                    \
  API int nvrtcGet##Name##Size(Program* program, size_t* size) { return *size = program->member.size() + extra, 0; } \
  API int nvrtcGet##Name(Program* program, char* out) {                                                              \
    return program->member.copy(out, program->member.size()), extra ? out[program->member.size()] = 0 : 0, 0;        \
  }
TEXT(PTX, ptx, 1)
TEXT(CUBIN, cubin, 0)
TEXT(ProgramLog, log, 1)
