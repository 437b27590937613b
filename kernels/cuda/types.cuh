// Types that every kernel uses. NVRTC has no standard headers, and nvcc's own define the usual
// names, so these have names of our own.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
