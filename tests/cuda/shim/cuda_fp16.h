// The types and conversions of this header are in cuda_shim.h.
