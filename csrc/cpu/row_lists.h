// The rows of a level, checked and sorted into what the kernels ask for.
#pragma once

#include <cstdint>
#include <vector>

#include "level.h"
#include "stable_torch.h"

namespace lasem_fast {

// The values of an int64 list of so many entries, each from 0 to `limit` - 1.
const int64_t* list_values(const torch::stable::Tensor& list, const char* name, int64_t length,
                           int64_t limit);
// Which rows a mask [rows] names; all where there is none.
std::vector<bool> live_rows(const torch::stable::Tensor* live, int64_t rows);

// What the lists `parents` and `branches` of a level say. Rows that are not `live` (null: all are)
// are left out, with the parents and branches that only they use.
class RowLists {
 public:
  // Raises where a list does not fit a level of so many parents and branches.
  RowLists(const torch::stable::Tensor& parents, const torch::stable::Tensor& branches,
           const torch::stable::Tensor* live, int64_t parent_count, int64_t branch_count);
  RowLists(const RowLists&) = delete;
  RowLists& operator=(const RowLists&) = delete;

  int64_t rows() const { return rows_; }  // of the lists, live or not
  bool any() const { return !classes.empty(); }
  int64_t slots() const { return static_cast<int64_t>(branch_of_.size()); }
  LevelRows table() const { return {row_of_.data(), branch_of_.data()}; }

  // The classes' panels have room for `panels` each.
  void make_room_for_panels(int64_t panels);
  // The image, counted over the classes, at which each of `tasks` parts of equal cost begins, and
  // the end.
  std::vector<int64_t> split_images(int64_t samples, int64_t tasks) const;

  std::vector<LevelClass> classes;
  std::vector<int64_t> idle_parents, idle_branches;  // that no row uses

 private:
  int64_t rows_;
  std::vector<int64_t> row_of_, branch_of_, parents_, panels_;
};

}  // namespace lasem_fast
