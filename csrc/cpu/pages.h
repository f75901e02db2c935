// Large blocks of memory, taken from the operating system and given back to it block by block. Out
// of malloc's heap they would leave holes, around what little lives on, that no later block fits:
// the heap of a step that makes thousands of outputs grew to several times what it held.
#pragma once

#include <cstddef>

namespace lasem_fast {

// `bytes` of memory, at least 64-byte aligned; on huge pages where there are such and it is that
// large. Throws std::bad_alloc.
void* take_pages(size_t bytes);

// Gives back what take_pages(bytes) gave.
void give_pages_back(void* data, size_t bytes);

}  // namespace lasem_fast
